/* dot_rows for any x86-64: bytes are widened to 16 bits, pmaddwd adds pairs into int32. */
#include <emmintrin.h>

#define DOT_ROWS 2

/* Eight bytes as 16 bits each: the low or the high half of a register. */
ALWAYS_INLINE __m128i widen_low(const int is_signed, __m128i bytes) {
    return is_signed ? _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8) : _mm_unpacklo_epi8(bytes, _mm_setzero_si128());
}

ALWAYS_INLINE __m128i widen_high(const int is_signed, __m128i bytes) {
    return is_signed ? _mm_srai_epi16(_mm_unpackhi_epi8(bytes, bytes), 8) : _mm_unpackhi_epi8(bytes, _mm_setzero_si128());
}

/* Two registers of (2 columns x 2 halves of a quad): adds the halves, four columns. */
ALWAYS_INLINE __m128i join_halves(__m128i low, __m128i high) {
    const __m128 l = _mm_castsi128_ps(low), h = _mm_castsi128_ps(high);
    return _mm_add_epi32(_mm_castps_si128(_mm_shuffle_ps(l, h, 0x88)), _mm_castps_si128(_mm_shuffle_ps(l, h, 0xdd)));
}

/* Eight columns. */
ALWAYS_INLINE void dot_half_group(const int sign, const int is_ahead, const int rows, const int8_t *x, size_t x_row,
                                  const uint8_t *w, int quads, int32_t *acc) {
    __m128i a[DOT_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++)
            a[r][i] = _mm_setzero_si128();
    for (int k = 0; k < quads; k++, w += 64) {
        fetch(is_ahead, w);
        __m128i b[DOT_ROWS];
        for (int r = 0; r < rows; r++)
            b[r] = widen_low(sign == SIGNED_X, _mm_set1_epi32(quad_at(x + r * x_row + 4 * k)));
        for (int i = 0; i < 2; i++) {
            const __m128i bytes = _mm_loadu_si128((const __m128i *)w + i);
            const __m128i low = widen_low(sign == UNSIGNED_X, bytes), high = widen_high(sign == UNSIGNED_X, bytes);
            for (int r = 0; r < rows; r++) {
                a[r][2 * i] = _mm_add_epi32(a[r][2 * i], _mm_madd_epi16(b[r], low));
                a[r][2 * i + 1] = _mm_add_epi32(a[r][2 * i + 1], _mm_madd_epi16(b[r], high));
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++) {
            __m128i *sum = (__m128i *)(acc + r * NX_BLOCK) + i;
            _mm_storeu_si128(sum, _mm_add_epi32(_mm_loadu_si128(sum), join_halves(a[r][2 * i], a[r][2 * i + 1])));
        }
}

ALWAYS_INLINE void dot_rows(const int sign, const int is_ahead, int rows, const int8_t *x, size_t x_row, const uint8_t *w,
                            size_t second, int quads, int32_t *acc) {
    for (int half = 0; half < 4; half++) {
        const uint8_t *columns = w + (half / 2 ? second : 0) + half % 2 * 32;
        if (rows == 1)
            dot_half_group(sign, is_ahead && half % 2 == 0, 1, x, x_row, columns, quads, acc + 8 * half);
        else
            dot_half_group(sign, is_ahead && half % 2 == 0, 2, x, x_row, columns, quads, acc + 8 * half);
    }
}
