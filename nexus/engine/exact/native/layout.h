/* Where things lie in packed matrices, pages and the workspace. */
#ifndef NEXUS_LAYOUT_H
#define NEXUS_LAYOUT_H

#include <stddef.h>

#include "nexus_native.h"

#define NX_BLOCK        32 /* columns (outputs) of one block of work, and most GEMM rows of one */
#define NX_GROUP        16 /* columns that lie together in a packed matrix */
#define NX_QUERIES      8  /* queries of one block of attention */
#define NX_HEAD_DIM_MAX 256
#define NX_K_MAX        65536 /* inputs of a linear layer: 128 * 255 * 65536 < 2^31, see dot.h */
#define NX_LONGEST      (INT64_C(1) << 26)
#define NX_ROWS_MAX     65536
#define NX_THREADS_MAX  256

static inline int64_t pad_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/* ---- packed matrices ---- */

static inline size_t group_bytes(int64_t k) { return (size_t)pad_to(k, 64) * NX_GROUP; }

/* Weight [n, k] of a packed matrix. The four bytes from a k that is a multiple of 4 lie together. */
static inline size_t packed_offset(int64_t n, int64_t k, size_t group) {
    return (size_t)(n / NX_GROUP) * group + (size_t)(k / 4) * 64 + (size_t)(n % NX_GROUP) * 4 + (size_t)(k % 4);
}

/* ---- pages of keys and values ---- */

/* Keys of a head are a packed matrix with the 64 positions as outputs and the dimensions as inputs (bytes plus 128); wide attention
 * has two of them, of high and of low bytes. Values are one with the dimensions as outputs and the positions as inputs (plain
 * int8). So the dot products of attention are those of the linear layers. */
typedef struct {
    size_t key_part; /* bytes of one packed matrix of keys */
    size_t key_head; /* bytes of a head's keys: one or two of them */
    size_t value_head;
    size_t values, key_scales, value_scales; /* offsets within the layer; keys are at 0; scales are float32 [kv_heads][64] */
    size_t bytes;
} page_layer;

static inline int64_t key_dim(const nx_model *m) { return pad_to(m->head_dim, 4); }

static inline page_layer page_layer_of(const nx_model *m, const nx_layer *layer) {
    page_layer p;
    const size_t heads = (size_t)m->kv_heads;
    p.key_part = (size_t)key_dim(m) * NX_PAGE_TOKENS;
    p.key_head = p.key_part * (layer->wide_attention ? 2 : 1);
    p.value_head = (size_t)pad_to(m->head_dim, NX_GROUP) * NX_PAGE_TOKENS;
    p.values = p.key_head * heads;
    p.key_scales = p.values + p.value_head * heads;
    p.value_scales = p.key_scales + heads * NX_PAGE_TOKENS * sizeof(float);
    p.bytes = p.value_scales + heads * NX_PAGE_TOKENS * sizeof(float);
    return p;
}

static inline size_t page_bytes_of(const nx_model *m) {
    size_t bytes = 0;
    for (int32_t l = 0; l < m->layers; l++)
        bytes += page_layer_of(m, &m->layer[l]).bytes;
    return bytes;
}

/* ---- what is committed to ---- */

typedef struct {
    int64_t width[NX_VALUES]; /* float32 numbers of a row */
    int64_t before[NX_VALUES]; /* those of the values before it */
    int64_t floats;            /* of all values */
    int64_t record;            /* bytes */
} committed_layer;

/* With a norm after the linear layer, its output is committed to as well as the new x. */
static inline committed_layer committed_layer_of(const nx_model *m, const nx_layer *layer) {
    const int64_t attention = (int64_t)m->heads * m->head_dim, hidden = m->hidden;
    committed_layer c = {{layer->qkv.n, attention, hidden * (m->encoder || layer->post_attention_norm.weight ? 2 : 1), layer->down.k,
                          hidden * (m->encoder || layer->post_mlp_norm.weight ? 2 : 1)},
                         {0},
                         0,
                         m->encoder ? 0 : m->head_dim * (2 + layer->wide_attention) + 2 * (int64_t)sizeof(float)};
    for (int i = 0; i < NX_VALUES; i++) {
        c.before[i] = c.floats;
        c.floats += c.width[i];
    }
    return c;
}

/* Values are hashed some layers at a time, so that there are enough of them to fill the lanes. */
#define NX_HELD_BYTES (INT64_C(2) << 20)

/* ---- workspace ---- */

/* Consecutive rows of one run whose queries of one head of keys are computed together. */
typedef struct {
    int32_t run, row, rows;
} query_block;

typedef struct {
    float *row;      /* one row, between norm and quantisation */
    float *scores;   /* [NX_QUERIES][longest] */
    double *weights; /* [NX_QUERIES][longest] */
    uint8_t *parts;  /* [2 * NX_QUERIES][longest]: high and low bytes of the integer weights */
    int64_t *gathered; /* [2 * rows][8] of the sums' check, see check.h */
} thread_space;

typedef struct {
    float *x;                /* [rows, hidden] the residual stream */
    float *y;                /* [rows, widest output] what a linear layer put out */
    float *attention;        /* [rows, heads * head_dim] */
    float *h;                /* [rows, intermediate] */
    int8_t *quantised;       /* activations of the linear layer at hand */
    float *scale;            /* [rows] their scales */
    int32_t *sum;            /* [2 * rows] sums of their integers */
    int8_t *query;           /* [rows, heads, 2, key_dim] */
    float *query_scale;      /* [rows, heads] */
    int32_t *query_sum;      /* [rows, heads, 2] sums of their integers */
    float *angle[2];         /* [rows, rotated]: cosines, then sines */
    int32_t *run_of;         /* [rows] */
    int64_t *position;       /* [rows] */
    int32_t *logit_row;      /* [rows] rows that logits are asked of */
    int32_t *committed_row;  /* [rows] their number among those that are committed to, or -1 */
    int32_t *committed_logit; /* [committed] numbers of the logits that are committed to */
    int64_t *expected;       /* [2 * rows] what the sums of a linear layer must come to (check.h); then those of the low bytes */
    int64_t *found;          /* [2 * rows] what they came to */
    float *held;             /* [held_layers] values that are to be hashed */
    uint8_t *held_records;   /* [held_layers] */
    uint8_t *slices;         /* [committed][slices of a row of logits][32] */
    size_t held_floats, held_record_bytes; /* of one layer */
    int held_layers;
    query_block *blocks;     /* [rows] */
    uint8_t **scratch_pages; /* encoders: pages of one layer, and for each run its first */
    int64_t *first_page;
    uint8_t *scratch;
    thread_space *thread;
    size_t scratch_page_bytes;
    int64_t longest; /* positions that fit in a thread's space */
} workspace;

/* Takes aligned pieces off a region, or only counts them where the region is NULL. */
typedef struct {
    uint8_t *base;
    size_t used;
} carver;

static inline void *carve(carver *c, size_t bytes) {
    void *piece = c->base ? c->base + c->used : NULL;
    c->used += (bytes + 63) / 64 * 64;
    return piece;
}

static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Sizes that every layer of the stage fits into. */
typedef struct {
    int64_t output, input, intermediate;
} widths;

static inline widths widths_of(const nx_model *m) {
    widths w = {m->hidden, m->hidden, 0};
    for (int32_t l = 0; l < m->layers; l++) {
        const nx_layer *layer = &m->layer[l];
        w.output = larger(w.output, layer->qkv.n);
        w.input = larger(w.input, larger(layer->o.k, layer->down.k));
        w.intermediate = larger(w.intermediate, layer->down.k);
    }
    return w;
}

static inline void lay_out_held(const nx_model *m, size_t rows, carver *c, workspace *ws) {
    ws->held_floats = ws->held_record_bytes = 0;
    for (int32_t l = 0; l < m->layers; l++) {
        const committed_layer layer = committed_layer_of(m, &m->layer[l]);
        ws->held_floats = (size_t)larger((int64_t)ws->held_floats, layer.floats);
        ws->held_record_bytes = (size_t)larger((int64_t)ws->held_record_bytes, layer.record * m->kv_heads);
    }
    ws->held_floats *= rows;
    ws->held_record_bytes *= rows;
    /* As many layers each time, so that none is left over. */
    const int64_t bytes = (int64_t)(ws->held_floats * sizeof(float) + ws->held_record_bytes);
    const int64_t times = larger(1, pad_to(m->layers * bytes, NX_HELD_BYTES) / NX_HELD_BYTES);
    ws->held_layers = (int)larger(1, (m->layers + times - 1) / times);
    ws->held = carve(c, (size_t)ws->held_layers * ws->held_floats * sizeof(float));
    ws->held_records = carve(c, (size_t)ws->held_layers * ws->held_record_bytes);
    ws->slices = carve(c, m->head.weights ? rows * slices_of((uint64_t)m->head.n * sizeof(float)) * NX_HASH_BYTES : 0);
}

/* Lays out a workspace from `base`, returns its bytes; with base NULL it only counts. */
static inline size_t lay_out_workspace(const nx_model *m, int64_t rows, int64_t runs, int64_t longest, int32_t threads,
                                       int64_t committed, void *base, workspace *ws) {
    const widths wide = widths_of(m);
    const size_t r = (size_t)rows;
    carver c = {base, 0};
    ws->x = carve(&c, r * (size_t)m->hidden * sizeof(float));
    ws->y = carve(&c, r * (size_t)wide.output * sizeof(float));
    ws->attention = carve(&c, r * (size_t)m->heads * (size_t)m->head_dim * sizeof(float));
    ws->h = carve(&c, r * (size_t)wide.intermediate * sizeof(float));
    ws->quantised = carve(&c, (size_t)pad_to(2 * rows, NX_BLOCK) * (size_t)pad_to(wide.input, 64));
    ws->scale = carve(&c, r * sizeof(float));
    ws->sum = carve(&c, 2 * r * sizeof(int32_t));
    ws->query = carve(&c, r * (size_t)m->heads * 2 * (size_t)key_dim(m));
    ws->query_scale = carve(&c, r * (size_t)m->heads * sizeof(float));
    ws->query_sum = carve(&c, r * (size_t)m->heads * 2 * sizeof(int32_t));
    for (int i = 0; i < 2; i++)
        ws->angle[i] = carve(&c, m->rope[i].coarse ? r * (size_t)m->rotated * sizeof(float) : 0);
    ws->run_of = carve(&c, r * sizeof(int32_t));
    ws->position = carve(&c, r * sizeof(int64_t));
    ws->logit_row = carve(&c, r * sizeof(int32_t));
    ws->blocks = carve(&c, r * sizeof(query_block));
    ws->committed_row = carve(&c, r * sizeof(int32_t));
    ws->committed_logit = carve(&c, (size_t)committed * sizeof(int32_t));
    ws->expected = carve(&c, 2 * r * sizeof(int64_t));
    ws->found = carve(&c, 2 * r * sizeof(int64_t));
    lay_out_held(m, (size_t)committed, &c, ws);
    ws->first_page = carve(&c, (size_t)runs * sizeof(int64_t));
    ws->scratch_page_bytes = 0;
    const size_t pages = m->encoder ? (size_t)(rows / NX_PAGE_TOKENS + runs) : 0;
    for (int32_t l = 0; m->encoder && l < m->layers; l++)
        ws->scratch_page_bytes = (size_t)larger((int64_t)ws->scratch_page_bytes, (int64_t)page_layer_of(m, &m->layer[l]).bytes);
    ws->scratch_pages = carve(&c, pages * sizeof(uint8_t *));
    ws->scratch = carve(&c, pages * ws->scratch_page_bytes);
    /* A block of queries may begin and end within a page, and its rows see different stretches. */
    ws->longest = pad_to(longest, NX_PAGE_TOKENS) + NX_PAGE_TOKENS;
    ws->thread = carve(&c, (size_t)threads * sizeof(thread_space));
    for (int32_t i = 0; i < threads; i++) {
        thread_space space;
        space.row = carve(&c, (size_t)larger(wide.input, wide.output) * sizeof(float));
        space.scores = carve(&c, NX_QUERIES * (size_t)ws->longest * sizeof(float));
        space.weights = carve(&c, NX_QUERIES * (size_t)ws->longest * sizeof(double));
        space.parts = carve(&c, 2 * NX_QUERIES * (size_t)ws->longest);
        space.gathered = carve(&c, 2 * r * 8 * sizeof(int64_t));
        if (base)
            ws->thread[i] = space;
    }
    return c.used;
}

#endif
