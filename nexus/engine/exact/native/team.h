/* The threads of one step: they run the same program and meet between its phases.
 *
 * A step of a small model has hundreds of phases of some ten microseconds, too short for one OpenMP region each. So there is one region per step,
 * and within it a barrier that spins for a moment before it gives the processor away. */
#ifndef NEXUS_TEAM_H
#define NEXUS_TEAM_H

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

typedef struct {
    _Alignas(64) atomic_int next;     /* first item of the phase that nobody has taken */
    _Alignas(64) atomic_int arrived;  /* threads that wait at the barrier */
    _Alignas(64) atomic_uint meeting; /* how often they met */
    int threads;
    int cancelled; /* written by the last to arrive, read by all after the meeting */
    const volatile int32_t *cancel;
} team;

#define TEAM_SPINS 4000

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline void begin_phase(team *t) {
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    t->cancelled = t->cancel && *t->cancel;
}

/* All threads have done their part of the phase: the next one begins. */
static inline void meet(team *t) {
    if (t->threads == 1) {
        begin_phase(t);
        return;
    }
    const unsigned meeting = atomic_load_explicit(&t->meeting, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&t->arrived, 1, memory_order_acq_rel) + 1 == t->threads) {
        begin_phase(t);
        atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&t->meeting, meeting + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&t->meeting, memory_order_acquire) == meeting; spins++) {
        if (spins < TEAM_SPINS)
            relax();
        else
            sched_yield();
    }
}

/* Takes the next `chunk` items of the phase; the first of them, which is `count` or more when none is left. */
static inline int take(team *t, int chunk) {
    if (t->threads > 1)
        return atomic_fetch_add_explicit(&t->next, chunk, memory_order_relaxed);
    const int first = atomic_load_explicit(&t->next, memory_order_relaxed);
    atomic_store_explicit(&t->next, first + chunk, memory_order_relaxed);
    return first;
}

#endif
