/* Which variants there are, which of them this processor runs, and all that no variant changes. Compiled for the baseline. */
#include <stdatomic.h>
#include <string.h>

#include "layout.h"

typedef int32_t step_function(const nx_model *, nx_batch *);

typedef void hash_function(const nx_leaf *, int64_t, uint8_t);
typedef void check_function(int64_t, int64_t, const int32_t *, const int8_t *, int64_t *);

typedef struct {
    const char *name;
    step_function *step;
    hash_function *hash;
    check_function *check_rows;
    int (*is_supported)(void);
} variant;

/* ---- processors ---- */

static int always(void) { return 1; }

#if defined(__x86_64__)
#include <cpuid.h>

/* Registers that the operating system saves: bit 2 AVX, 5 to 7 AVX-512, 17 and 18 AMX. */
static uint64_t enabled_state(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27)))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

typedef struct {
    unsigned ebx, ecx, edx, more_eax; /* leaf 7: subleaf 0, and eax of subleaf 1 */
} features;

static features feature_bits(void) {
    unsigned eax, ignored;
    features f = {0, 0, 0, 0};
    if (__get_cpuid_count(7, 0, &eax, &f.ebx, &f.ecx, &f.edx) && eax >= 1)
        __get_cpuid_count(7, 1, &f.more_eax, &ignored, &ignored, &ignored);
    return f;
}

static int has_bits(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

static int has_avx2(void) { return has_bits(enabled_state(), 0x6) && (feature_bits().ebx & (1u << 5)); }
static int has_avxvnni(void) { return has_avx2() && (feature_bits().more_eax & (1u << 4)); }
static int has_avx512(void) {
    const features f = feature_bits();
    const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, vnni = 1u << 11;
    return has_avx2() && has_bits(enabled_state(), 0xe6) && has_bits(f.ebx, f_dq_bw_vl) && (f.ecx & vnni);
}

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define TILE_DATA           18

/* Linux gives tiles to processes that ask for them (arch/x86/xstate.rst). */
static int has_amx(void) {
    const unsigned tile_int8 = 1u << 24 | 1u << 25;
    return has_avx512() && has_bits(enabled_state(), 1u << 17 | 1u << 18) && has_bits(feature_bits().edx, tile_int8) &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}
#else
static int has_amx(void) { return 0; }
#endif

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
static int has_dotprod(void) { return (getauxval(AT_HWCAP) & (1ul << 20)) != 0; } /* HWCAP_ASIMDDP */
#elif defined(__aarch64__) && defined(__APPLE__)
static int has_dotprod(void) { return 1; } /* every Apple processor that runs macOS */
#else
static int has_dotprod(void) { return 0; }
#endif

/* ---- variants, fastest first ---- */

#define DECLARE(name)                                                                                                              \
    int32_t nx_step_##name(const nx_model *, nx_batch *);                                                                          \
    hash_function nx_hash_##name;                                                                                                  \
    check_function nx_check_rows_##name;
#define VARIANT(name, is_supported) {#name, nx_step_##name, nx_hash_##name, nx_check_rows_##name, is_supported}
#ifdef NX_HAVE_amx
DECLARE(amx)
#endif
#ifdef NX_HAVE_avx512
DECLARE(avx512)
#endif
#ifdef NX_HAVE_avxvnni
DECLARE(avxvnni)
#endif
#ifdef NX_HAVE_avx2
DECLARE(avx2)
#endif
#ifdef NX_HAVE_sse2
DECLARE(sse2)
#endif
#ifdef NX_HAVE_dotprod
DECLARE(dotprod)
#endif
#ifdef NX_HAVE_neon
DECLARE(neon)
#endif
DECLARE(portable)

static const variant VARIANTS[] = {
#ifdef NX_HAVE_amx
    VARIANT(amx, has_amx),
#endif
#ifdef NX_HAVE_avx512
    VARIANT(avx512, has_avx512),
#endif
#ifdef NX_HAVE_avxvnni
    VARIANT(avxvnni, has_avxvnni),
#endif
#ifdef NX_HAVE_avx2
    VARIANT(avx2, has_avx2),
#endif
#ifdef NX_HAVE_sse2
    VARIANT(sse2, always),
#endif
#ifdef NX_HAVE_dotprod
    VARIANT(dotprod, has_dotprod),
#endif
#ifdef NX_HAVE_neon
    VARIANT(neon, always),
#endif
    VARIANT(portable, always),
};
#define VARIANT_COUNT ((int32_t)(sizeof VARIANTS / sizeof *VARIANTS))

/* Asking the processor traps in virtual machines (some 50 us), so answers are kept: 0 not asked, 1 yes, 2 no. All threads find the
 * same. */
static atomic_int answers[sizeof VARIANTS / sizeof *VARIANTS];

static int is_supported(int32_t index) {
    int answer = atomic_load_explicit(&answers[index], memory_order_acquire);
    if (answer == 0) {
        answer = VARIANTS[index].is_supported() ? 1 : 2;
        atomic_store_explicit(&answers[index], answer, memory_order_release);
    }
    return answer == 1;
}

#define EXPORT __attribute__((visibility("default")))

EXPORT int32_t nx_abi(void) { return NX_ABI; }

EXPORT int32_t nx_variants(nx_variant *variants, int32_t room) {
    for (int32_t i = 0; i < VARIANT_COUNT && i < room; i++)
        variants[i] = (nx_variant){VARIANTS[i].name, is_supported(i), 0};
    return VARIANT_COUNT;
}

EXPORT int32_t nx_hash(int32_t index, const nx_leaf *leaves, int64_t count, int32_t prefix) {
    if (index < 0 || index >= VARIANT_COUNT || !is_supported(index) || (count && !leaves) || prefix < 0 || prefix > 255)
        return NX_BAD_ARGUMENT;
    VARIANTS[index].hash(leaves, count, (uint8_t)prefix);
    return NX_OK;
}

EXPORT int32_t nx_check_rows(int32_t index, int64_t count, int64_t k, const int32_t *key, const int8_t *rows, int64_t *check) {
    if (index < 0 || index >= VARIANT_COUNT || !is_supported(index) || !key || !rows || !check)
        return NX_BAD_ARGUMENT;
    VARIANTS[index].check_rows(count, k, key, rows, check);
    return NX_OK;
}

EXPORT int32_t nx_step(int32_t index, const nx_model *model, nx_batch *batch) {
    if (index < 0 || index >= VARIANT_COUNT || !is_supported(index) || !model || !batch)
        return NX_BAD_ARGUMENT;
    return VARIANTS[index].step(model, batch);
}

/* ---- packing ---- */

EXPORT uint64_t nx_packed_bytes(int64_t n, int64_t k) {
    if (n < 1 || k < 1 || n > INT32_MAX - NX_BLOCK || k > NX_K_MAX)
        return 0;
    return (uint64_t)(pad_to(n, NX_BLOCK) / NX_GROUP) * group_bytes(k);
}

/* Row n of the matrix: its k bytes, plus 128; zeros up to the padded depth. `row` NULL: all zeros. */
static void pack_row(uint8_t *packed, int64_t n, int64_t k, const int8_t *row) {
    const size_t group = group_bytes(k);
    uint8_t *to = packed + packed_offset(n, 0, group);
    const int64_t whole = row ? k / 4 : 0;
    for (int64_t quad = 0; quad < whole; quad++) {
        uint32_t bytes;
        memcpy(&bytes, row + 4 * quad, 4);
        bytes ^= 0x80808080u;
        memcpy(to + quad * 64, &bytes, 4);
    }
    for (int64_t i = 4 * whole; i < pad_to(k, 64); i++)
        to[i / 4 * 64 + i % 4] = (row && i < k ? (uint8_t)row[i] : 0) ^ 0x80u;
}

EXPORT int32_t nx_pack(uint8_t *packed, int64_t n, int64_t k, int64_t first, int64_t last, const int8_t *rows) {
    if (!packed || !rows || !nx_packed_bytes(n, k) || first < 0 || first >= last || last > n)
        return NX_BAD_ARGUMENT;
    for (int64_t i = first; i < last; i++)
        pack_row(packed, i, k, rows + (size_t)(i - first) * (size_t)k);
    for (int64_t i = n; last == n && i < pad_to(n, NX_BLOCK); i++)
        pack_row(packed, i, k, NULL);
    return NX_OK;
}

/* ---- models ---- */

static int is_linear(const nx_linear *w, int64_t n, int64_t k) {
    return w->weights && w->scale && w->n == n && w->k == k && n >= 1 && k >= 1 && k <= NX_K_MAX && n <= INT32_MAX - NX_BLOCK &&
           (w->wide == 0 || w->wide == 1);
}

static int is_norm(const nx_model *m, const nx_norm *norm) { return norm->weight && (m->norm_kind == NX_RMS_NORM || norm->bias); }

static int is_layer(const nx_model *m, const nx_layer *layer) {
    const int64_t heads = (int64_t)m->heads * m->head_dim, kv = (int64_t)m->kv_heads * m->head_dim;
    const int64_t inner = layer->down.k;
    const int rope_is_there = layer->rope < 0 || (layer->rope < 2 && m->rope[layer->rope].coarse && m->rope[layer->rope].fine);
    return is_linear(&layer->qkv, heads + 2 * kv, m->hidden) && is_linear(&layer->o, m->hidden, heads) &&
           (!layer->gate.weights || (is_linear(&layer->gate, inner, m->hidden) && layer->gate.wide == layer->up.wide)) &&
           is_linear(&layer->up, inner, m->hidden) && is_linear(&layer->down, m->hidden, inner) &&
           is_norm(m, &layer->attention_norm) && is_norm(m, &layer->mlp_norm) && rope_is_there && layer->window >= 0 &&
           (layer->wide_attention == 0 || layer->wide_attention == 1);
}

EXPORT int32_t nx_check_model(const nx_model *m) {
    /* hidden < 2^15: sums of squares in fixed point stay below 2^53 (rows.h). */
    const int shaped = m->hidden >= 1 && m->hidden < 32768 && m->kv_heads >= 1 && m->heads >= m->kv_heads && m->heads <= 4096 &&
                       m->heads % m->kv_heads == 0 && m->head_dim >= 1 && m->head_dim <= NX_HEAD_DIM_MAX && m->rotated >= 0 &&
                       m->rotated <= m->head_dim && m->rotated % 2 == 0 && m->layers >= 0 && m->layers <= 65536;
    if (!shaped || (m->layers && !m->layer) || !m->exp_hi || !m->exp_lo || (m->activation == NX_GELU && !m->phi))
        return NX_BAD_ARGUMENT;
    if (m->activation < NX_SILU || m->activation > NX_GELU || m->norm_kind < NX_RMS_NORM || m->norm_kind > NX_LAYER_NORM)
        return NX_BAD_ARGUMENT;
    if (m->embed.weights && !is_linear(&m->embed, m->embed.n, m->hidden))
        return NX_BAD_ARGUMENT;
    if (m->embed.weights && m->encoder && (!m->position || !m->type || m->positions < 1 || !is_norm(m, &m->embed_norm)))
        return NX_BAD_ARGUMENT;
    if (m->head.weights && (!is_linear(&m->head, m->head.n, m->hidden) || !is_norm(m, &m->final_norm)))
        return NX_BAD_ARGUMENT;
    for (int32_t l = 0; l < m->layers; l++)
        if (!is_layer(m, &m->layer[l]))
            return NX_BAD_ARGUMENT;
    return NX_OK;
}

EXPORT uint64_t nx_page_bytes(const nx_model *model) { return page_bytes_of(model); }

EXPORT uint64_t nx_workspace_bytes(const nx_model *model, int64_t rows, int64_t runs, int64_t longest, int32_t threads,
                                   int64_t committed) {
    workspace ignored;
    if (rows < 1 || rows > NX_ROWS_MAX || runs < 1 || runs > rows || longest < 1 || longest > NX_LONGEST || threads < 1 ||
        threads > NX_THREADS_MAX || committed < 0 || committed > rows)
        return 0;
    return lay_out_workspace(model, rows, runs, longest, threads, committed, NULL, &ignored);
}
