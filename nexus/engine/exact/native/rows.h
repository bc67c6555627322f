/* Operations on one row of float32 values, as docs/exact.md has them: integers of a row, norms, exp and what is made of it.
 *
 * Plain loops that the compiler vectorises. A sum marked `omp simd reduction` may be taken in any order since all of its partial
 * sums are integers below 2^53; no other sum may be. */
#ifndef NEXUS_ROWS_H
#define NEXUS_ROWS_H

#include <math.h>

#include "dot.h"

#define SMALLEST 0x1p-40f
#define LARGEST  0x1p+40f

/* rint, ties to even, of |v| <= 2^22 (float) or 2^51 (double): there is room for the integer part only after the addition. One way
 * on all processors, also on those that have no rounding instruction, and it vectorises. */
ALWAYS_INLINE float rint_float(float v) { return (v + 0x1.8p+23f) - 0x1.8p+23f; }
ALWAYS_INLINE double rint_double(double v) { return (v + 0x1.8p+52) - 0x1.8p+52; }

/* max |x|, raised to 2^-40. Returns 0 where it is beyond 2^40 or any value is not a number: bits of magnitudes order as the
 * magnitudes do, with NaN above all. */
static inline int largest(const float *x, int n, float *a) {
    const int32_t *bits = (const int32_t *)x;
    int32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < n; i++) {
        const int32_t magnitude = bits[i] & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    memcpy(a, &most, sizeof *a);
    if (!(*a <= LARGEST)) {
        *a = 1.0f;
        return 0;
    }
    if (*a < SMALLEST)
        *a = SMALLEST;
    return 1;
}

/* ---- integers of a row ---- */

/* Where the integers of a row go: 64 of them in one piece, the next 64 `stride` bytes later; where `padded`, with zeros up to a
 * whole 64. */
typedef struct {
    int8_t *high, *low; /* low: 16 bits only */
    size_t stride;
    int padded;
} integers;

/* 8 bits. Returns the sum of the integers. */
ALWAYS_INLINE int32_t quantise8_part(const float *x, int n, float factor, int8_t *q) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) {
        const int32_t v = (int32_t)rint_float(x[i] * factor);
        q[i] = (int8_t)v;
        sum += v;
    }
    return sum;
}

ALWAYS_INLINE void quantise16_part(const float *x, int n, float factor, int8_t *high, int8_t *low, int32_t sums[2]) {
    int32_t sum_high = 0, sum_low = 0;
#pragma omp simd reduction(+ : sum_high, sum_low)
    for (int i = 0; i < n; i++) {
        const int32_t v = (int32_t)rint_float(x[i] * factor), h = (v + 128) >> 8;
        high[i] = (int8_t)h;
        low[i] = (int8_t)(v - 256 * h);
        sum_high += h;
        sum_low += v - 256 * h;
    }
    sums[0] += sum_high;
    sums[1] += sum_low;
}

/* Integers, scale and their sums (one, or two with 16 bits) of a row. Returns 0 for a row out of bounds, which becomes zeros. */
static inline int quantise(const float *x, int n, int wide, integers to, float *scale, int32_t sums[2]) {
    float a;
    const int good = largest(x, n, &a);
    const float most = wide ? 32512.0f : 127.0f, factor = most / a;
    *scale = a / most;
    sums[0] = 0;
    if (wide)
        sums[1] = 0;
    for (int first = 0; first < n; first += 64, to.high += to.stride, to.low += wide ? to.stride : 0) {
        const int count = n - first < 64 ? n - first : 64;
        if (count < 64 && to.padded) {
            memset(to.high, 0, 64);
            if (wide)
                memset(to.low, 0, 64);
        }
        if (!good) {
            memset(to.high, 0, (size_t)count);
            if (wide)
                memset(to.low, 0, (size_t)count);
        } else if (wide) {
            quantise16_part(x + first, count, factor, to.high, to.low, sums);
        } else {
            sums[0] +=
                count == 64 ? quantise8_part(x + first, 64, factor, to.high) : quantise8_part(x + first, count, factor, to.high);
        }
    }
    return good;
}

/* ---- norms ---- */

/* Sums of a row in fixed point, v = rint(x * c): |v| <= 2^19 and n < 2^15 (checked when a model is loaded), so S2 < 2^53. */
typedef struct {
    double s1, s2, c;
} fixed_sums;

static inline int fixed_point(const float *x, int n, fixed_sums *sums) {
    float a;
    int exponent;
    const int good = largest(x, n, &a);
    frexpf(a, &exponent);
    const float c = ldexpf(1.0f, 19 - exponent);
    double s1 = 0, s2 = 0;
    if (good) {
#pragma omp simd reduction(+ : s1, s2)
        for (int i = 0; i < n; i++) {
            const double v = (double)rint_float(x[i] * c);
            s1 += v;
            s2 += v * v;
        }
    }
    *sums = (fixed_sums){s1, s2, (double)c};
    return good;
}

/* y may be x. Returns 0 for a row out of bounds, y is zeros then. */
static inline int rms_norm(const float *x, const float *weight, double eps, int n, float *y) {
    fixed_sums s;
    if (!fixed_point(x, n, &s)) {
        memset(y, 0, (size_t)n * sizeof *y);
        return 0;
    }
    const float r = (float)(1.0 / sqrt((s.s2 / (s.c * s.c)) / (double)n + eps));
    for (int i = 0; i < n; i++)
        y[i] = (x[i] * r) * weight[i];
    return 1;
}

static inline int layer_norm(const float *x, const nx_norm *norm, double eps, int n, float *y) {
    fixed_sums s;
    if (!fixed_point(x, n, &s)) {
        memset(y, 0, (size_t)n * sizeof *y);
        return 0;
    }
    const double mean = (s.s1 / s.c) / (double)n, spread = (s.s2 / (s.c * s.c)) / (double)n - mean * mean;
    const float r = (float)(1.0 / sqrt((spread > 0 ? spread : 0) + eps)), mu = (float)mean;
    for (int i = 0; i < n; i++)
        y[i] = ((x[i] - mu) * r) * norm->weight[i] + norm->bias[i];
    return 1;
}

/* ---- exp and its kin ---- */

/* e^-x for x >= 0; the index stays in the table whatever x is, also for NaN. */
ALWAYS_INLINE double exp_neg(const nx_model *m, float x) {
    const int32_t i = (int32_t)rint_float((x < 31.75f ? x : 31.75f) * 32768.0f);
    return m->exp_hi[i >> 12] * m->exp_lo[i & 4095];
}

ALWAYS_INLINE double sigmoid(const nx_model *m, float v) {
    const double e = exp_neg(m, fabsf(v));
    return (v >= 0 ? 1.0 : e) / (1.0 + e);
}

ALWAYS_INLINE float cap(const nx_model *m, float v, float limit) {
    const double e = exp_neg(m, 2.0f * fabsf(v / limit));
    return copysignf((float)(((1.0 - e) / (1.0 + e)) * (double)limit), v);
}

ALWAYS_INLINE double normal_below(const nx_model *m, float v) {
    const float magnitude = fabsf(v);
    const double t = (double)(magnitude < 7.998f ? magnitude : 7.998f) * 512.0;
    const int32_t i = (int32_t)t;
    const double p = m->phi[i] + (t - (double)i) * (m->phi[i + 1] - m->phi[i]);
    return v < 0 ? 1.0 - p : p;
}

ALWAYS_INLINE float silu(const nx_model *m, float g) { return (float)((double)g * sigmoid(m, g)); }

ALWAYS_INLINE float gelu_tanh(const nx_model *m, float g) {
    const double d = (double)g, z = (d + ((d * d) * d) * 0.044715) * 1.5957691216057308;
    const double limited = z > 1e30 ? 1e30 : z < -1e30 ? -1e30 : z;
    return (float)(d * sigmoid(m, (float)limited));
}

ALWAYS_INLINE float gelu(const nx_model *m, float g) { return (float)((double)g * normal_below(m, g)); }

/* h = act(g), in place. */
static inline void activate(const nx_model *m, float *g, int n) {
    switch (m->activation) {
    case NX_SILU:
#pragma omp simd
        for (int i = 0; i < n; i++)
            g[i] = silu(m, g[i]);
        break;
    case NX_GELU_TANH:
#pragma omp simd
        for (int i = 0; i < n; i++)
            g[i] = gelu_tanh(m, g[i]);
        break;
    default:
#pragma omp simd
        for (int i = 0; i < n; i++)
            g[i] = gelu(m, g[i]);
    }
}

#endif
