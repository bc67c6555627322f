/* dot_rows for AVX-512 VNNI: vpdpbusd adds four products of an unsigned and a signed byte to an int32, without saturation. */
#include <immintrin.h>

#define DOT_ROWS 8

ALWAYS_INLINE __m512i dot_quads(const int sign, __m512i sum, __m512i x, __m512i w) {
    return sign == SIGNED_X ? _mm512_dpbusd_epi32(sum, w, x) : _mm512_dpbusd_epi32(sum, x, w);
}

ALWAYS_INLINE void dot_fixed(const int sign, const int is_ahead, const int rows, const int8_t *x, size_t x_row, const uint8_t *w,
                             size_t second, int quads, int32_t *acc) {
    __m512i a[DOT_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++)
            a[r][i] = _mm512_loadu_si512(acc + r * NX_BLOCK + 16 * i);
    for (int k = 0; k < quads; k++, w += 64) {
        fetch(is_ahead, w);
        fetch(is_ahead, w + second);
        const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + second);
        for (int r = 0; r < rows; r++) {
            const __m512i b = _mm512_set1_epi32(quad_at(x + r * x_row + 4 * k));
            a[r][0] = dot_quads(sign, a[r][0], b, w0);
            a[r][1] = dot_quads(sign, a[r][1], b, w1);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++)
            _mm512_storeu_si512(acc + r * NX_BLOCK + 16 * i, a[r][i]);
}

ALWAYS_INLINE void dot_rows(const int sign, const int is_ahead, int rows, const int8_t *x, size_t x_row, const uint8_t *w,
                            size_t second, int quads, int32_t *acc) {
    switch (rows) {
    case 1: dot_fixed(sign, is_ahead, 1, x, x_row, w, second, quads, acc); break;
    case 2: dot_fixed(sign, is_ahead, 2, x, x_row, w, second, quads, acc); break;
    case 3: dot_fixed(sign, is_ahead, 3, x, x_row, w, second, quads, acc); break;
    case 4: dot_fixed(sign, is_ahead, 4, x, x_row, w, second, quads, acc); break;
    case 5: dot_fixed(sign, is_ahead, 5, x, x_row, w, second, quads, acc); break;
    case 6: dot_fixed(sign, is_ahead, 6, x, x_row, w, second, quads, acc); break;
    case 7: dot_fixed(sign, is_ahead, 7, x, x_row, w, second, quads, acc); break;
    default: dot_fixed(sign, is_ahead, 8, x, x_row, w, second, quads, acc); break;
    }
}
