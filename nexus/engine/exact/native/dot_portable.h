/* dot_rows in plain C: any processor. Unsigned accumulators, since they wrap by the standard. */
#define DOT_ROWS 1

ALWAYS_INLINE void dot_rows(const int sign, const int is_ahead, int rows, const int8_t *x, size_t x_row, const uint8_t *w, size_t second, int quads,
                            int32_t *acc) {
    (void)is_ahead, (void)rows, (void)x_row;
    for (int group = 0; group < 2; group++, w += second, acc += NX_GROUP) {
        int32_t a[NX_GROUP * 4] = {0}; /* one per column and position within the quad: no shuffles */
        for (int k = 0; k < quads; k++) {
            const uint8_t *quad = w + (size_t)k * 64;
            int16_t b[4];
            for (int j = 0; j < 4; j++)
                b[j] = sign == SIGNED_X ? (int16_t)x[4 * k + j] : (int16_t)(uint8_t)x[4 * k + j];
            for (int i = 0; i < NX_GROUP * 4; i++)
                a[i] += (int16_t)(sign == SIGNED_X ? (int16_t)quad[i] : (int16_t)(int8_t)quad[i]) * b[i % 4];
        }
        for (int c = 0; c < NX_GROUP; c++)
            acc[c] += (a[4 * c] + a[4 * c + 1]) + (a[4 * c + 2] + a[4 * c + 3]);
    }
}
