/* Freivalds' check (1977) of a linear layer's sums, by which a step that commits finds that it computed wrongly.
 *
 * For weights W there are a random key r, a number from 0 to 2^29 per row, and v = r W, made as the weights were loaded. Modulo the
 * prime P = 2^31 - 1, r.sums = v.x must hold for the sums and the integers x of every token. Wrong sums, from a flipped bit or a wrong
 * kernel, pass with a probability of 2^-29: all but one number of the key could be known, and one value of the last would do.
 *
 * P is chosen for its size, half of Z/2^64: a step reads all of v. Differences of sums lie between -2^32 and 2^32, so that none but
 * multiples of 2^31 - 1 are zero modulo P. */
#ifndef NEXUS_CHECK_H
#define NEXUS_CHECK_H

#include "dot.h"

#define CHECK_PRIME ((INT64_C(1) << 31) - 1)
#define KEY_BITS    29
/* Partial sums that are kept apart: those of columns 8 i + 0 or 1, 8 i + 2 or 3, ... Nothing is added across a vector until the end. */
#define CHECK_LANES 8

/* x modulo P, but for a few bits: 2^31 is 1. */
#define FOLD(x) (((x) & CHECK_PRIME) + ((x) >> 31))

#if defined(__AVX512F__) && !defined(NX_PORTABLE)

/* lanes += key * (acc - correction) of 32 columns. Four products of less than 2^61 are summed before they are folded. */
ALWAYS_INLINE void add_block(int64_t lanes[CHECK_LANES], const int32_t *key, const int32_t *acc, int32_t correction) {
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < NX_BLOCK; i += 16) {
        const __m512i a = _mm512_sub_epi32(_mm512_loadu_si512(acc + i), _mm512_set1_epi32(correction)), r = _mm512_loadu_si512(key + i);
        sum = _mm512_add_epi64(sum, _mm512_mul_epi32(a, r));
        sum = _mm512_add_epi64(sum, _mm512_mul_epi32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(r, 32)));
    }
    const __m512i low = _mm512_and_si512(sum, _mm512_set1_epi64(CHECK_PRIME)), high = _mm512_srai_epi64(sum, 31);
    _mm512_storeu_si512(lanes, _mm512_add_epi64(_mm512_loadu_si512(lanes), _mm512_add_epi64(low, high)));
}

/* v.x: less than 2^31 * 2^7 * 2^16. */
ALWAYS_INLINE int64_t times_check(const int32_t *v, const int8_t *x, int count) {
    __m512i sum = _mm512_setzero_si512();
    int k = 0;
    for (; k + 16 <= count; k += 16) {
        const __m512i a = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(x + k))), b = _mm512_loadu_si512(v + k);
        sum = _mm512_add_epi64(sum, _mm512_mul_epi32(a, b));
        sum = _mm512_add_epi64(sum, _mm512_mul_epi32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32)));
    }
    int64_t total = _mm512_reduce_add_epi64(sum);
    for (; k < count; k++)
        total += (int64_t)v[k] * x[k];
    return total;
}

#else

ALWAYS_INLINE void add_block(int64_t lanes[CHECK_LANES], const int32_t *key, const int32_t *acc, int32_t correction) {
    for (int lane = 0; lane < CHECK_LANES; lane++) {
        int64_t sum = 0;
        for (int c = 2 * lane; c < NX_BLOCK; c += 2 * CHECK_LANES)
            sum += (int64_t)key[c] * (acc[c] - correction) + (int64_t)key[c + 1] * (acc[c + 1] - correction);
        lanes[lane] += FOLD(sum);
    }
}

ALWAYS_INLINE int64_t times_check(const int32_t *v, const int8_t *x, int count) {
    int64_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int k = 0; k < count; k++)
        sum += (int64_t)v[k] * x[k];
    return sum;
}

#endif

/* The columns at the end that are less than a block. */
static inline void add_columns(int64_t lanes[CHECK_LANES], const int32_t *key, const int32_t *acc, int32_t correction, int count) {
    for (int c = 0; c < count; c++) {
        const int64_t product = (int64_t)key[c] * (acc[c] - correction);
        lanes[c % CHECK_LANES] += FOLD(product);
    }
}

/* v += r W of `count` rows [k], exact: less than 2^29 * 2^7 * 2^25. */
static inline void add_rows(int64_t count, int64_t k, const int32_t *key, const int8_t *rows, int64_t *v) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4, rows += 4 * k) { /* four at a time: v is read and written less often */
        const int64_t a = key[i], b = key[i + 1], c = key[i + 2], d = key[i + 3];
#pragma omp simd
        for (int64_t j = 0; j < k; j++)
            v[j] += (a * rows[j] + b * rows[k + j]) + (c * rows[2 * k + j] + d * rows[3 * k + j]);
    }
    for (; i < count; i++, rows += k)
        for (int64_t j = 0; j < k; j++)
            v[j] += (int64_t)key[i] * rows[j];
}

#endif
