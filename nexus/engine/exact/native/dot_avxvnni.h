/* dot_rows for AVX-VNNI (256 bits): vpdpbusd adds four products of an unsigned and a signed byte to an int32, unsaturated. */
#include <immintrin.h>

#define DOT_ROWS 3
#define COLUMNS  4 /* registers of 8 columns */

ALWAYS_INLINE void dot_fixed(const int sign, const int is_ahead, const int rows, const int8_t *x, size_t x_row, const uint8_t *w,
                             size_t second, int quads, int32_t *acc) {
    __m256i a[DOT_ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < COLUMNS; i++)
            a[r][i] = _mm256_loadu_si256((const __m256i *)(acc + r * NX_BLOCK) + i);
    for (int k = 0; k < quads; k++, w += 64) {
        fetch(is_ahead, w);
        fetch(is_ahead, w + second);
        __m256i b[DOT_ROWS];
        for (int r = 0; r < rows; r++)
            b[r] = _mm256_set1_epi32(quad_at(x + r * x_row + 4 * k));
        for (int i = 0; i < COLUMNS; i++) {
            const __m256i quad = _mm256_loadu_si256((const __m256i *)(i < 2 ? w : w + second) + i % 2);
            for (int r = 0; r < rows; r++)
                a[r][i] =
                    sign == SIGNED_X ? _mm256_dpbusd_avx_epi32(a[r][i], quad, b[r]) : _mm256_dpbusd_avx_epi32(a[r][i], b[r], quad);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < COLUMNS; i++)
            _mm256_storeu_si256((__m256i *)(acc + r * NX_BLOCK) + i, a[r][i]);
}

ALWAYS_INLINE void dot_rows(const int sign, const int is_ahead, int rows, const int8_t *x, size_t x_row, const uint8_t *w,
                            size_t second, int quads, int32_t *acc) {
    switch (rows) {
    case 1: dot_fixed(sign, is_ahead, 1, x, x_row, w, second, quads, acc); break;
    case 2: dot_fixed(sign, is_ahead, 2, x, x_row, w, second, quads, acc); break;
    default: dot_fixed(sign, is_ahead, 3, x, x_row, w, second, quads, acc); break;
    }
}
