/* The floating point environment that the arithmetic of docs/exact.md asks for: round to nearest even, no subnormal flushed to
 * zero, no traps. Other code of the process may have set another one in the thread that calls (torch does so), so it is set at
 * entry and put back after. */
#ifndef NEXUS_FLOAT_CONTROL_H
#define NEXUS_FLOAT_CONTROL_H

#include <float.h>
#include <stdint.h>

#ifdef __FAST_MATH__
#error "the exact engine must not be compiled with -ffast-math"
#endif
#if FLT_EVAL_METHOD != 0
#error "the exact engine needs float and double computed as such (no x87)"
#endif

#if defined(__SSE2__)
#include <xmmintrin.h>
typedef unsigned int float_control;
static inline float_control set_float_control(void) {
    const float_control before = _mm_getcsr();
    _mm_setcsr(0x1f80); /* all exceptions masked, nearest, neither FTZ nor DAZ */
    return before;
}
static inline void restore_float_control(float_control before) { _mm_setcsr(before); }
#elif defined(__aarch64__)
typedef uint64_t float_control;
static inline float_control set_float_control(void) {
    float_control before;
    const float_control wanted = 0; /* nearest, no flush to zero, no traps */
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(wanted) : "memory");
    return before;
}
static inline void restore_float_control(float_control before) { __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory"); }
#else
#include <fenv.h>
typedef fenv_t float_control;
static inline float_control set_float_control(void) {
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    return before;
}
static inline void restore_float_control(float_control before) { fesetenv(&before); }
#endif

#endif
