/* The threads of one step. All run the same program, a sequence of phases; a phase is a list of items that they take from.
 *
 * A step of a small model has hundreds of phases of some ten microseconds, too short for one OpenMP region each. So there is one
 * region per step. A phase is over when its items are done, not when every thread has come by: a thread that the system has taken
 * off its processor without an item in hand holds up nobody, and finds its way to the others through phases that are long over. */
#ifndef NEXUS_TEAM_H
#define NEXUS_TEAM_H

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

typedef struct {
    _Alignas(64) atomic_uint_least64_t next; /* phase << 32 | first item of it that nobody has taken */
    _Alignas(64) atomic_int done;            /* items of the phase that are done */
    _Alignas(64) atomic_int cancelled;       /* once set it stays: whoever sees it leaves */
    int threads;
    const volatile int32_t *cancel;
} team;

/* One thread's place in the program. */
typedef struct {
    uint32_t phase;
    int first, taken; /* items in hand; with a single thread `first` is where it stands */
} place;

#define TEAM_SPINS 4000

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline void look_for_cancel(team *t) {
    if (t->cancel && *t->cancel)
        atomic_store_explicit(&t->cancelled, 1, memory_order_relaxed);
}

static inline int is_cancelled(team *t) { return atomic_load_explicit(&t->cancelled, memory_order_relaxed); }

static inline uint32_t phase_of(uint64_t next) { return (uint32_t)(next >> 32); }

/* The items in hand are done. Who finishes the last one of a phase begins the next. */
static inline void give_back(team *t, place *p, int count) {
    const int done = atomic_fetch_add_explicit(&t->done, p->taken, memory_order_acq_rel) + p->taken;
    p->taken = 0;
    if (done < count)
        return;
    look_for_cancel(t);
    atomic_store_explicit(&t->done, 0, memory_order_relaxed);
    atomic_store_explicit(&t->next, (uint64_t)(p->phase + 1) << 32, memory_order_release);
}

/* Up to `chunk` more of the `count` >= 1 items of a phase: the first of them; those taken before are done. Returns `count` when all
 * items of the phase are done, whoever did them: then everything they wrote can be read, and the next call begins the next phase.
 */
static inline int take(team *t, place *p, int chunk, int count) {
    if (t->threads == 1) {
        const int first = p->first;
        p->first = first < count ? first + chunk : 0;
        if (first >= count)
            look_for_cancel(t);
        return first < count ? first : count;
    }
    if (p->taken)
        give_back(t, p, count);
    uint64_t next = atomic_load_explicit(&t->next, memory_order_acquire);
    while (phase_of(next) == p->phase && (int)(uint32_t)next < count) {
        const int first = (int)(uint32_t)next;
        if (atomic_compare_exchange_weak_explicit(&t->next, &next, next + (uint64_t)chunk, memory_order_acquire,
                                                  memory_order_acquire)) {
            p->taken = chunk < count - first ? chunk : count - first;
            return first;
        }
    }
    for (int spins = 0; phase_of(atomic_load_explicit(&t->next, memory_order_acquire)) == p->phase; spins++) {
        if (spins < TEAM_SPINS)
            relax();
        else
            sched_yield();
    }
    p->phase++;
    return count;
}

#endif
