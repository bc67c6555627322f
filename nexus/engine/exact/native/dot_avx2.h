/* dot_rows for AVX2: bytes are widened to 16 bits, vpmaddwd adds pairs into int32. Nothing saturates (vpmaddubsw would). */
#include <immintrin.h>

#define DOT_ROWS 2

ALWAYS_INLINE __m256i widen(const int is_signed, __m128i bytes) {
    return is_signed ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
}

/* Eight registers of (4 columns x 2 halves of a quad) hold 16 columns: adds the halves and puts the columns in order. */
ALWAYS_INLINE __m256i join_halves(__m256i low, __m256i high) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
}

ALWAYS_INLINE void dot_group(const int sign, const int is_ahead, const int rows, const int8_t *x, size_t x_row, const uint8_t *w,
                             int quads, int32_t *acc) {
    __m256i a[DOT_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++)
            a[r][i] = _mm256_setzero_si256();
    for (int k = 0; k < quads; k++, w += 64) {
        fetch(is_ahead, w);
        __m256i b[DOT_ROWS];
        for (int r = 0; r < rows; r++)
            b[r] = widen(sign == SIGNED_X, _mm_set1_epi32(quad_at(x + r * x_row + 4 * k)));
        for (int i = 0; i < 4; i++) {
            const __m256i quad = widen(sign == UNSIGNED_X, _mm_loadu_si128((const __m128i *)w + i));
            for (int r = 0; r < rows; r++)
                a[r][i] = _mm256_add_epi32(a[r][i], _mm256_madd_epi16(b[r], quad));
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++) {
            __m256i *sum = (__m256i *)(acc + r * NX_BLOCK) + i;
            _mm256_storeu_si256(sum, _mm256_add_epi32(_mm256_loadu_si256(sum), join_halves(a[r][2 * i], a[r][2 * i + 1])));
        }
}

ALWAYS_INLINE void dot_rows(const int sign, const int is_ahead, int rows, const int8_t *x, size_t x_row, const uint8_t *w,
                            size_t second, int quads, int32_t *acc) {
    for (int group = 0; group < 2; group++, w += second, acc += NX_GROUP) {
        if (rows == 1)
            dot_group(sign, is_ahead, 1, x, x_row, w, quads, acc);
        else
            dot_group(sign, is_ahead, 2, x, x_row, w, quads, acc);
    }
}
