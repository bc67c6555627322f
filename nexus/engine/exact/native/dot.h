/* Integer dot products over packed matrices: the inner loop of everything.
 *
 *     acc[r][c] += sum over k < 4 * quads of x[r][k] * w[k][c]        r < rows, c < 32
 *
 * w is two groups of 16 columns ([k / 4][16][4] bytes each), `second` bytes apart. Of the two byte operands one is signed and the
 * other is not, as the VNNI instructions want it:
 *   SIGNED_X:    x is int8, w is a weight (or key) plus 128; the caller subtracts 128 * sum(x)
 *   UNSIGNED_X:  x is uint8 (a byte of an attention weight), w is int8 (a value)
 * `is_ahead` asks for the weights that follow. Both are constants where the functions are inlined.
 *
 * Overflow. Every accumulator is a sum of at most `depth` products of a magnitude of at most 128 * 255 = 32640, and is exact while
 * depth * 32640 < 2^31, that is up to depth 65,792: linear layers have at most NX_K_MAX = 65,536 inputs, attention spills to int64
 * every 1,024 pages of 64 positions. Partial sums of pairs or quads (maddwd, dpbusd without saturation, sdot) are int32 as well.
 */
#ifndef NEXUS_DOT_H
#define NEXUS_DOT_H

#include <stdint.h>
#include <string.h>

#include "layout.h"

enum { SIGNED_X = 0, UNSIGNED_X = 1 };

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE int32_t quad_at(const void *p) {
    int32_t quad;
    memcpy(&quad, p, 4);
    return quad;
}

/* How far ahead of the weights at hand memory is asked for; decoding is bound by it. Pages are small and near: nothing is asked for
 * there. */
#define AHEAD_BYTES 16384

ALWAYS_INLINE void fetch(const int is_ahead, const uint8_t *w) {
    if (is_ahead)
        __builtin_prefetch(w + AHEAD_BYTES, 0, 3);
}

ALWAYS_INLINE void fetch_lines(const uint8_t *from, size_t lines) {
    for (size_t i = 0; i < lines; i++)
        __builtin_prefetch(from + 64 * i, 0, 3);
}

#if defined(NX_PORTABLE)
#include "dot_portable.h"
#elif defined(__AVX512VNNI__)
#include "dot_avx512.h"
#elif defined(__AVXVNNI__)
#include "dot_avxvnni.h"
#elif defined(__AVX2__)
#include "dot_avx2.h"
#elif defined(__SSE2__)
#include "dot_sse2.h"
#elif defined(__ARM_NEON)
#include "dot_neon.h"
#else
#include "dot_portable.h"
#endif

/* Any number of rows, in register blocks; only the first of them has to wait for memory. */
ALWAYS_INLINE void dot(const int sign, const int is_ahead, const int8_t *x, size_t x_row, int rows, const uint8_t *w, size_t second,
                       int quads, int32_t *acc) {
    dot_rows(sign, is_ahead, rows < DOT_ROWS ? rows : DOT_ROWS, x, x_row, w, second, quads, acc);
    for (int done = DOT_ROWS; done < rows; done += DOT_ROWS)
        dot_rows(sign, 0, rows - done < DOT_ROWS ? rows - done : DOT_ROWS, x + done * x_row, x_row, w, second, quads,
                 acc + done * NX_BLOCK);
}

#endif
