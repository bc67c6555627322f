/* The compiled step of the exact engine: interface.
 *
 * One call of nx_step takes a batch of runs (consecutive tokens of one session each) through all layers of a stage. The arithmetic
 * is that of docs/exact.md, to the letter: every variant gives the same bits, on one thread or many, alone or in a batch.
 *
 * Nothing is allocated and nothing global is written: all memory is handed in, calls from several threads at once are fine as long
 * as they use different workspaces and different sessions. Structures hold only pointers, 32 and 64 bit integers and floats, so
 * that the ctypes mirrors in native.py are line by line the same.
 */
#ifndef NEXUS_NATIVE_H
#define NEXUS_NATIVE_H

#include <stdint.h>

#include "hash.h"

#define NX_ABI         2  /* raised with every change of a structure; native.py refuses another */
#define NX_PAGE_TOKENS 64 /* positions of one session in a page of keys and values */

enum nx_result {
    NX_OK = 0,
    NX_BOUNDS = 1,      /* a run met an activation that is not a number or beyond 2^40: see nx_run.status; the others are right */
    NX_CANCELLED = 2,   /* the flag was raised: nothing was put out, keys and values from `position` on are not valid */
    NX_WORKSPACE = 3,   /* workspace smaller than nx_workspace_bytes */
    NX_BAD_ARGUMENT = 4, /* a size, a token id or a position that the model does not have */
    NX_WRONG = 5         /* a linear layer's sums are not those of its weights: nothing of the step may be used */
};
enum nx_activation { NX_SILU = 0, NX_GELU_TANH = 1, NX_GELU = 2 };
enum nx_norm_kind { NX_RMS_NORM = 0, NX_LAYER_NORM = 1 };
enum nx_logits { NX_NO_LOGITS = 0, NX_LAST_LOGITS = 1, NX_ALL_LOGITS = 2 };

typedef struct {
    const uint8_t *weights; /* packed by nx_pack; NULL: there is no such layer */
    const float *scale;     /* [n] */
    const float *bias;      /* [n] or NULL */
    const int32_t *check;   /* [k] key times weights, summed over the rows, modulo 2^31 - 1 (check.h); NULL: nothing is checked.
                               That of `up` is of gate and up together, and `gate` has none */
    int32_t n, k;           /* outputs, inputs */
    int32_t wide;           /* 1: activations of 16 bits */
    int32_t reserved;
} nx_linear;

typedef struct {
    const float *weight; /* NULL: there is no such norm */
    const float *bias;   /* LayerNorm only */
} nx_norm;

typedef struct {
    nx_linear qkv, o, gate, up, down; /* gate.weights NULL: the activation is of `up` alone (encoders) */
    nx_norm attention_norm, mlp_norm; /* before the block; in an encoder after it */
    nx_norm post_attention_norm, post_mlp_norm, q_norm, k_norm;
    int32_t window;         /* positions a query sees, itself included; 0: all */
    int32_t rope;           /* index in nx_model.rope; -1: no rotation */
    int32_t wide_attention; /* 1: queries and keys of 16 bits */
    int32_t reserved;
} nx_layer;

typedef struct {
    const double *coarse; /* [coarse_rows, rotated / 2, 2]: cos, sin of 256 * row positions */
    const double *fine;   /* [256, rotated / 2, 2] */
    int64_t coarse_rows;
} nx_rope;

typedef struct {
    int32_t hidden, heads, kv_heads, head_dim;
    int32_t rotated; /* leading dimensions of a head that are rotated, even; 0: none */
    int32_t layers;  /* of this stage */
    int32_t norm_kind, activation;
    int32_t encoder; /* 1: post-norm, sees its whole run, keeps no keys and values */
    int32_t reserved;
    float attention_scale, attention_cap, final_cap; /* caps: 0 for none */
    float embed_scale;                               /* 0 for none */
    double norm_eps;
    const double *exp_hi, *exp_lo, *phi; /* [256], [4096], [4098] */
    nx_rope rope[2];
    nx_linear embed;              /* weights NULL: the stage is fed hidden states */
    const float *position, *type; /* encoders: [positions, hidden], [hidden] */
    int64_t positions;            /* rows of `position` */
    nx_norm embed_norm;           /* encoders */
    nx_linear head;               /* weights NULL: the stage puts out hidden states; tied weights: the pointers of `embed` */
    nx_norm final_norm;           /* before the head */
    const nx_layer *layer;        /* [layers] */
    const int32_t *key;           /* [most rows of any linear layer, gate and up as one] random numbers below 2^29 */
} nx_model;

typedef struct {
    uint8_t *const *pages; /* pages[i] holds positions [64 i, 64 (i + 1)); unused by encoders */
    int64_t position;      /* of the first token of the run */
    int32_t count;         /* tokens, at least 1 */
    int32_t logits;        /* enum nx_logits */
    int32_t status;        /* out: NX_OK or NX_BOUNDS */
    int32_t commit;        /* 1: nx_batch.commit is for this run, among others */
} nx_run;

/* What the linear layers and the attention of one layer put out; any pointer may be NULL. Rows are those of the batch; with
 * 16 bit activations there are twice as many: the sums of all high bytes, then those of all low bytes. */
typedef struct {
    int32_t *qkv, *o, *gate_up, *down; /* [rows, n] accumulators; gate_up: gate then up */
    float *attention;                  /* [rows, heads * head_dim] */
} nx_trace;

/* What a step commits to (nexus/proof/trace.py) of those runs that ask for it: `rows` are all rows of theirs, in order. Values of a
 * layer lie one after the other, [5][rows][width], in the order of enum nx_value; its records [kv_heads][rows][record]. The widths are
 * those of committed_layer in layout.h. Hashes are leaf hashes of rows and records. */
typedef struct {
    uint8_t *cells;   /* [layers][5][rows][32] */
    uint8_t *records; /* [layers][kv_heads][rows][32]; decoders */
    uint8_t *logits;  /* [rows of logits that those runs ask for][32] */
    float *values;    /* [layers] values themselves; NULL: nobody asks */
    uint8_t *logged;  /* [layers] records themselves; NULL as `values` is, and in encoders */
} nx_commit;
enum nx_value { NX_QKV = 0, NX_ATTENTION = 1, NX_O = 2, NX_GATE_UP = 3, NX_DOWN = 4, NX_VALUES = 5 };

typedef struct {
    nx_run *runs;
    int32_t run_count;
    int32_t threads;                /* at most; small steps use one */
    const uint32_t *ids;            /* [rows] where the model has an embedding, else NULL */
    const float *states;            /* [rows, hidden] where it has none, else NULL */
    float *states_out;              /* [rows, hidden]; NULL where the model has a head */
    float *logits_out;              /* [rows that ask for logits, in order, head.n] */
    const nx_trace *trace;          /* [layers] or NULL */
    const nx_commit *commit;        /* not NULL: linear layers are checked as well, of all runs; or NULL */
    const volatile int32_t *cancel; /* looked at between layers; or NULL */
    void *workspace;                /* aligned to 64 bytes */
    uint64_t workspace_bytes;
} nx_batch;

typedef struct {
    const char *name;
    int32_t supported; /* by this processor and operating system */
    int32_t reserved;
} nx_variant;

int32_t nx_abi(void);

/* The variants that were built, fastest first. Returns how many; fills at most `room` of them. */
int32_t nx_variants(nx_variant *variants, int32_t room);

/* Weights are packed once: [n / 16][k / 4][16][4] bytes, n padded to 32 and k to 64, each byte the weight plus 128. */
uint64_t nx_packed_bytes(int64_t n, int64_t k);

/* Packs rows [first, last) of a row-major int8 matrix [n, k]; `rows` points to row `first`. Blocks of rows may come in any order,
 * as they are read from a file. */
int32_t nx_pack(uint8_t *packed, int64_t n, int64_t k, int64_t first, int64_t last, const int8_t *rows);

/* Bytes of a page: for each layer keys, values, scales of keys, scales of values (see layout.h). Contents need no initialisation.
 */
uint64_t nx_page_bytes(const nx_model *model);

/* Bytes of workspace for at most `rows` tokens in `runs` runs, none of which ends beyond position `longest`; `committed` of the rows
 * are committed to. 0: sizes out of range. */
uint64_t nx_workspace_bytes(const nx_model *model, int64_t rows, int64_t runs, int64_t longest, int32_t threads, int64_t committed);

/* Checks sizes and pointers of a model once, after it was put together. */
int32_t nx_check_model(const nx_model *model);

/* Adds key[i] * row[i] of `count` rows [k] to check [k]: what nx_linear.check is before it is taken modulo 2^31 - 1. */
int32_t nx_check_rows(int32_t variant, int64_t count, int64_t k, const int32_t *key, const int8_t *rows, int64_t *check);

/* Hashes of many inputs: `prefix` (NX_LEAF or NX_NODE) and the data (hash.h). */
int32_t nx_hash(int32_t variant, const nx_leaf *leaves, int64_t count, int32_t prefix);

/* One step with a variant of nx_variants (its index). Returns enum nx_result. */
int32_t nx_step(int32_t variant, const nx_model *model, nx_batch *batch);

#endif
