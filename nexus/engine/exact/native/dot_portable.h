/* dot_rows in plain C, for any processor: 16 lanes at a time, so that the sums stay in registers and the compiler finds its
 * vectors. */
#define DOT_ROWS 1
#define LANES    16

ALWAYS_INLINE void dot_rows(const int sign, const int is_ahead, int rows, const int8_t *x, size_t x_row, const uint8_t *w,
                            size_t second, int quads, int32_t *acc) {
    (void)rows, (void)x_row;
    for (int group = 0; group < 2; group++, w += second, acc += NX_GROUP)
        for (int part = 0; part < NX_GROUP * 4; part += LANES) {
            int32_t a[LANES] = {0}; /* one per column and place in the quad */
            for (int k = 0; k < quads; k++) {
                const uint8_t *quad = w + (size_t)k * 64 + part;
                int16_t b[4];
                fetch(is_ahead && part == 0, quad);
                for (int i = 0; i < 4; i++)
                    b[i] = sign == SIGNED_X ? (int16_t)x[4 * k + i] : (int16_t)(uint8_t)x[4 * k + i];
                for (int i = 0; i < LANES; i++)
                    a[i] += (sign == SIGNED_X ? (int16_t)quad[i] : (int16_t)(int8_t)quad[i]) * b[i % 4];
            }
            for (int c = 0; c < LANES / 4; c++)
                acc[part / 4 + c] += (a[4 * c] + a[4 * c + 1]) + (a[4 * c + 2] + a[4 * c + 3]);
        }
}
