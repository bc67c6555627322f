/* The step of a stage, compiled once per variant (NX_VARIANT) with the flags of its instruction set.
 *
 * All threads run `run_step` together. Each phase is a list of items (rows, blocks of columns, blocks of queries) that they take
 * from (team.h). What an item computes does not depend on who takes it or when, so neither do the bits. */
#ifdef _OPENMP
#include <omp.h>
#endif

#include "check.h"
#include "dot.h"
#include "float_control.h"
#include "layout.h"
#include "rows.h"
#include "team.h"
#include "tiles.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b)  JOIN_(a, b)

#define DECLARE_HASH(variant) NX_DECLARE_HASH(variant)
DECLARE_HASH(NX_VARIANT)

typedef struct {
    const nx_model *m;
    nx_batch *b;
    workspace ws;
    team team;
    int rows, logit_rows, committed_rows, committed_logits;
    atomic_int wrong; /* a linear layer's sums were not those of its weights */
    int heads_together, head_blocks, query_blocks; /* how the queries of a step are cut into blocks */
} step;

/* One thread of the team. */
typedef struct {
    step *s;
    const thread_space *space;
    place place;
} worker;

static int min_int(int a, int b) { return a < b ? a : b; }
static int max_int(int a, int b) { return a > b ? a : b; }

static int next_item(worker *me, int chunk, int count) { return take(&me->s->team, &me->place, chunk, count); }

/* Threads that mark the same run write the same value. */
static void mark_out_of_bounds(step *s, int row) {
    __atomic_store_n(&s->b->runs[s->ws.run_of[row]].status, NX_BOUNDS, __ATOMIC_RELAXED);
}

static float *x_row(const step *s, int row) { return s->ws.x + (size_t)row * (size_t)s->m->hidden; }

/* ---- checks (check.h) ---- */

void JOIN(nx_check_rows_, NX_VARIANT)(int64_t count, int64_t k, const int32_t *key, const int8_t *rows, int64_t *check) {
    add_rows(count, k, key, rows, check);
}

/* Where a thread gathers what the sums of the columns it has in hand come to: [CHECK_LANES] per token and part. */
static int64_t *gathered(const worker *me, int token, int part) {
    return me->space->gathered + (size_t)(part * me->s->rows + token) * CHECK_LANES;
}

static void begin_gathering(const worker *me, const int32_t *key, int tokens, int parts) {
    for (int part = 0; key && part < parts; part++)
        memset(gathered(me, 0, part), 0, (size_t)tokens * CHECK_LANES * sizeof(int64_t));
}

/* Before the items in hand are given back: after that others may go on. */
static void end_gathering(const worker *me, const int32_t *key, int tokens, int parts) {
    for (int part = 0; key && part < parts; part++)
        for (int token = 0; token < tokens; token++) {
            const int64_t *lanes = gathered(me, token, part);
            int64_t *found = &me->s->ws.found[part * me->s->rows + token], sum = 0;
            for (int i = 0; i < CHECK_LANES; i++)
                sum += FOLD(lanes[i]);
            if (me->s->team.threads == 1)
                *found += sum;
            else
                __atomic_fetch_add(found, sum, __ATOMIC_RELAXED);
        }
}

/* The linear layer that a token went through is over: were its sums right? */
static void check_token(step *s, int token) {
    for (int part = 0; part < 2; part++) {
        int64_t *expected = &s->ws.expected[part * s->rows + token], *found = &s->ws.found[part * s->rows + token];
        if ((*expected - *found) % CHECK_PRIME)
            atomic_store_explicit(&s->wrong, 1, memory_order_relaxed);
        *expected = *found = 0;
    }
}

/* ---- linear layers ---- */

/* How the activations of a linear layer lie in ws.quantised. With 16 bits a token is two rows of the product: high bytes, low
 * bytes. */
typedef struct {
    int tokens, parts;
    int tiles;    /* in tiles (see tiles.h), else row by row */
    size_t depth; /* inputs, padded */
} operand;

static operand operand_of(const nx_linear *w, int tokens) {
    const int parts = w->wide ? 2 : 1;
    return (operand){tokens, parts, tokens * parts >= TILES_FROM, (size_t)pad_to(w->k, 64)};
}

static int8_t *operand_row(const step *s, const operand *o, int row) {
    if (o->tiles)
        return s->ws.quantised + (size_t)(row / TILE_ROWS) * o->depth * TILE_ROWS + (size_t)(row % TILE_ROWS) * 64;
    return s->ws.quantised + (size_t)row * o->depth;
}

/* Makes `values` the activations of a token (`index` among those of the operand) for w. */
static int quantise_token(const step *s, const nx_linear *w, const operand *o, int index, const float *values) {
    const int row = index * o->parts;
    const integers to = {operand_row(s, o, row), w->wide ? operand_row(s, o, row + 1) : NULL, o->tiles ? TILE_BYTES : 64, 1};
    if (s->b->commit && w->check) /* asked for in time: every step reads it from memory */
        fetch_lines((const uint8_t *)w->check, ((size_t)w->k * sizeof *w->check + 63) / 64);
    const int good = quantise(values, w->k, w->wide, to, &s->ws.scale[index], &s->ws.sum[row]);
    for (int part = 0; s->b->commit && w->check && part < o->parts; part++) {
        const int8_t *x = part ? to.low : to.high;
        int64_t sum = 0;
        if (to.stride == 64)
            sum = times_check(w->check, x, w->k);
        else
            for (int first = 0; first < w->k; first += 64, x += to.stride)
                sum += times_check(w->check + first, x, min_int(64, w->k - first));
        s->ws.expected[part * s->rows + index] = sum;
    }
    return good;
}

typedef struct {
    int32_t *sums; /* NULL: nobody asks */
    int columns, first;
} trace_at;

static void trace_sums(const operand *o, trace_at trace, int token, int part, int column, int count, const int32_t *acc,
                       int32_t correction) {
    int32_t *to = trace.sums + ((size_t)part * (size_t)o->tokens + (size_t)token) * (size_t)trace.columns + trace.first + column;
    for (int c = 0; c < count; c++)
        to[c] = acc[c] - correction;
}

ALWAYS_INLINE void scale_row(float *y, const int32_t *acc, int32_t correction, float s, const float *scale, int count) {
    for (int c = 0; c < count; c++)
        y[c] = ((float)(acc[c] - correction) * s) * scale[c];
}

ALWAYS_INLINE void scale_wide_row(float *y, const int32_t *high, const int32_t *low, const int32_t corrections[2], float s,
                                  const float *scale, int count) {
    for (int c = 0; c < count; c++) /* exact in float64: 256 * 2^31 + 2^31 < 2^53 */
        y[c] = ((float)((double)(high[c] - corrections[0]) * 256.0 + (double)(low[c] - corrections[1])) * s) * scale[c];
}

/* Outputs of a linear layer: y[t * stride + c] of token t and column c. */
typedef struct {
    float *y;
    size_t stride;
} outputs;

/* Tokens [first, first + tokens) times columns [column, column + 32) of w, of which those below w->n mean something. `key`: of the
 * layer's first column; NULL: nothing is checked. */
static void linear_block(const worker *me, const nx_linear *w, const operand *o, int first, int tokens, int column,
                         const int32_t *key, trace_at trace, outputs out) {
    const step *s = me->s;
    _Alignas(64) int32_t acc[NX_BLOCK * NX_BLOCK];
    const size_t group = group_bytes(w->k);
    const uint8_t *weights = w->weights + (size_t)(column / NX_GROUP) * group;
    const int rows = tokens * o->parts, count = min_int(NX_BLOCK, w->n - column);
    const int8_t *x = operand_row(s, o, first * o->parts);
    if (o->tiles) {
        dot_tiles(x, o->depth * TILE_ROWS, (rows + TILE_ROWS - 1) / TILE_ROWS, weights, group, (int)(o->depth / 64), first == 0,
                  acc);
    } else {
        memset(acc, 0, (size_t)rows * sizeof *acc * NX_BLOCK);
        dot(SIGNED_X, 1, x, o->depth, rows, weights, group, (int)(o->depth / 4), acc);
    }
    for (int t = 0; t < tokens; t++) {
        const int32_t *high = acc + t * o->parts * NX_BLOCK, *low = high + NX_BLOCK;
        const int32_t *sums = s->ws.sum + (size_t)(first + t) * (size_t)o->parts;
        const int32_t corrections[2] = {128 * sums[0], w->wide ? 128 * sums[1] : 0};
        const float scale = s->ws.scale[first + t];
        float *y = out.y + (size_t)t * out.stride;
        if (w->wide)
            scale_wide_row(y, high, low, corrections, scale, w->scale + column, count);
        else if (count == NX_BLOCK)
            scale_row(y, high, corrections[0], scale, w->scale + column, NX_BLOCK);
        else
            scale_row(y, high, corrections[0], scale, w->scale + column, count);
        for (int c = 0; w->bias && c < count; c++)
            y[c] = y[c] + w->bias[column + c];
        for (int part = 0; key && part < o->parts; part++)
            if (count == NX_BLOCK)
                add_block(gathered(me, first + t, part), key + column, part ? low : high, corrections[part]);
            else
                add_columns(gathered(me, first + t, part), key + column, part ? low : high, corrections[part], count);
        for (int part = 0; trace.sums && part < o->parts; part++)
            trace_sums(o, trace, first + t, part, column, count, part ? low : high, corrections[part]);
    }
}

/* Blocks of columns that a thread takes at once: neighbours, since memory likes that, and few enough that all threads end together.
 */
static int column_chunk(const step *s, int blocks) {
    return s->team.threads == 1 ? blocks : min_int(16, max_int(1, blocks / (s->team.threads * 8)));
}

/* What becomes of the outputs of a linear layer. */
typedef struct {
    float *y; /* [tokens, stride] */
    size_t stride;
    int add;   /* added to y, else put there */
    float cap; /* CAP, or 0 */
} target;

/* Phase: the activations in ws.quantised times w. */
static void linear(worker *me, const nx_linear *w, int tokens, target to, trace_at trace) {
    const step *s = me->s;
    const operand o = operand_of(w, tokens);
    const int blocks = (w->n + NX_BLOCK - 1) / NX_BLOCK, chunk = column_chunk(s, blocks), together = NX_BLOCK / o.parts;
    const int32_t *key = s->b->commit && w->check ? s->m->key : NULL;
    _Alignas(64) float y[NX_BLOCK][NX_BLOCK];
    if (o.tiles)
        begin_tiles();
    for (int block; (block = next_item(me, chunk, blocks)) < blocks;) {
        begin_gathering(me, key, tokens, o.parts);
        for (const int end = min_int(block + chunk, blocks); block < end; block++)
            for (int first = 0; first < tokens; first += together) {
                const int count = min_int(together, tokens - first), column = block * NX_BLOCK;
                const int columns = min_int(NX_BLOCK, w->n - column);
                float *out = to.y + (size_t)first * to.stride + column;
                linear_block(me, w, &o, first, count, column, key, trace,
                             to.add ? (outputs){y[0], NX_BLOCK} : (outputs){out, to.stride});
                for (int t = 0; t < count; t++, out += to.stride) {
                    for (int c = 0; to.add && c < columns; c++)
                        out[c] = out[c] + y[t][c];
                    for (int c = 0; to.cap != 0 && c < columns; c++)
                        out[c] = cap(s->m, out[c], to.cap);
                }
            }
        end_gathering(me, key, tokens, o.parts);
    }
    if (o.tiles)
        end_tiles();
}

/* Phase: h = act(gate) * up, or act(up). Gate and up of the same columns are computed together, so that h is all that is kept. */
static void gated_linear(worker *me, const nx_layer *layer, int32_t *trace) {
    const step *s = me->s;
    const nx_linear *gate = layer->gate.weights ? &layer->gate : NULL, *up = &layer->up;
    const operand o = operand_of(up, s->rows);
    const int blocks = (up->n + NX_BLOCK - 1) / NX_BLOCK, chunk = column_chunk(s, blocks), together = NX_BLOCK / o.parts;
    const int32_t *key = s->b->commit && up->check ? s->m->key : NULL, *up_key = key && gate ? key + up->n : key;
    const trace_at gate_trace = {trace, gate ? 2 * up->n : 0, 0}, up_trace = {trace, gate ? 2 * up->n : up->n, gate ? up->n : 0};
    _Alignas(64) float g[NX_BLOCK][NX_BLOCK], u[NX_BLOCK][NX_BLOCK];
    if (o.tiles)
        begin_tiles();
    for (int block; (block = next_item(me, chunk, blocks)) < blocks;) {
        begin_gathering(me, key, s->rows, o.parts);
        for (const int end = min_int(block + chunk, blocks); block < end; block++)
            for (int first = 0; first < s->rows; first += together) {
                const int count = min_int(together, s->rows - first), column = block * NX_BLOCK;
                const int columns = min_int(NX_BLOCK, up->n - column);
                linear_block(me, up, &o, first, count, column, up_key, up_trace, (outputs){u[0], NX_BLOCK});
                if (gate)
                    linear_block(me, gate, &o, first, count, column, key, gate_trace, (outputs){g[0], NX_BLOCK});
                for (int t = 0; t < count; t++) {
                    float *h = s->ws.h + (size_t)(first + t) * (size_t)up->n + column, *act = gate ? g[t] : u[t];
                    activate(s->m, act, columns);
                    for (int c = 0; c < columns; c++)
                        h[c] = gate ? act[c] * u[t][c] : act[c];
                }
            }
        end_gathering(me, key, s->rows, o.parts);
    }
    if (o.tiles)
        end_tiles();
}

/* ---- rows between linear layers ---- */

static void normalise(step *s, const nx_norm *norm, int row, const float *x, int n, float *y) {
    const double eps = s->m->norm_eps;
    const int good = s->m->norm_kind == NX_LAYER_NORM ? layer_norm(x, norm, eps, n, y) : rms_norm(x, norm->weight, eps, n, y);
    if (!good)
        mark_out_of_bounds(s, row);
}

static void quantise_row(step *s, const nx_linear *w, const operand *o, int row, const float *values) {
    check_token(s, row);
    if (!quantise_token(s, w, o, row, values))
        mark_out_of_bounds(s, row);
}

static int is_there(const nx_norm *norm) { return norm && norm->weight; }

/* A value of a layer. */
typedef struct {
    int layer; /* -1: none */
    enum nx_value op;
} value_id;

/* The linear layer that ends a block, `op`, and the norm after it. */
typedef struct {
    value_id value;
    const nx_norm *norm;
} block_end;

/* Where a row of a value is kept until it is hashed, or for the caller; NULL: nobody commits to it. */
static float *committed_value(const step *s, value_id id, int row) {
    const int number = s->ws.committed_row[row];
    if (id.layer < 0 || number < 0)
        return NULL;
    const committed_layer c = committed_layer_of(s->m, &s->m->layer[id.layer]);
    const nx_commit *commit = s->b->commit;
    float *layer = commit->values ? commit->values + (size_t)id.layer * s->ws.held_floats
                                  : s->ws.held + (size_t)(id.layer % s->ws.held_layers) * s->ws.held_floats;
    return layer + (size_t)c.before[id.op] * (size_t)s->committed_rows + (size_t)number * (size_t)c.width[id.op];
}

static uint8_t *committed_record(const step *s, int layer, int head, int row) {
    const int number = s->ws.committed_row[row];
    if (number < 0)
        return NULL;
    const nx_commit *commit = s->b->commit;
    uint8_t *records = commit->values ? commit->logged + (size_t)layer * s->ws.held_record_bytes
                                      : s->ws.held_records + (size_t)(layer % s->ws.held_layers) * s->ws.held_record_bytes;
    return records + ((size_t)head * (size_t)s->committed_rows + (size_t)number) *
                         (size_t)committed_layer_of(s->m, &s->m->layer[layer]).record;
}

/* x of a row after a block. Without a norm the linear layer has added to x itself; a decoder adds what the norm makes of y, an
 * encoder's x is what the norm makes of the sum. */
static void end_block(step *s, const block_end *end, int row, float *scratch) {
    const int n = s->m->hidden;
    float *x = x_row(s, row), *y = s->ws.y + (size_t)row * (size_t)n;
    float *committed = committed_value(s, end->value, row);
    if (is_there(end->norm)) {
        if (committed) {
            memcpy(committed, y, (size_t)n * sizeof *y);
            committed += n;
        }
        if (s->m->encoder) {
            for (int i = 0; i < n; i++)
                x[i] = x[i] + y[i];
            normalise(s, end->norm, row, x, n, x);
        } else {
            normalise(s, end->norm, row, y, n, scratch);
            for (int i = 0; i < n; i++)
                x[i] = x[i] + scratch[i];
        }
    }
    if (committed)
        memcpy(committed, x, (size_t)n * sizeof *x);
}

/* Phase: the rows leave a block and become the activations of `next`; a decoder normalises them on the way. */
static void enter_block(worker *me, const block_end *end, const nx_norm *norm, const nx_linear *next) {
    step *s = me->s;
    float *scratch = me->space->row;
    const operand o = operand_of(next, s->rows);
    for (int row; (row = next_item(me, 1, s->rows)) < s->rows;) {
        float *x = x_row(s, row);
        end_block(s, end, row, scratch);
        if (!s->m->encoder)
            normalise(s, norm, row, x, s->m->hidden, scratch);
        quantise_row(s, next, &o, row, s->m->encoder ? x : scratch);
    }
}

/* Phase: rows of `values` [rows, k], which are value `id`, become the activations of w, and a copy of them `trace`, if there is one.
 */
static void quantise_rows(worker *me, const nx_linear *w, const float *values, value_id id, float *trace) {
    step *s = me->s;
    const operand o = operand_of(w, s->rows);
    const size_t k = (size_t)w->k;
    for (int row; (row = next_item(me, 1, s->rows)) < s->rows;) {
        const float *x = values + (size_t)row * k;
        float *committed = committed_value(s, id, row);
        quantise_row(s, w, &o, row, x);
        if (committed)
            memcpy(committed, x, k * sizeof *x);
        if (trace)
            memcpy(trace + (size_t)row * k, x, k * sizeof *x);
    }
}

/* ---- queries, keys and values ---- */

/* Where a row's key and value are kept: positions count from the beginning of the session, in an encoder from that of the run. */
static int64_t slot_of(const step *s, int row) {
    return s->ws.position[row] - (s->m->encoder ? s->b->runs[s->ws.run_of[row]].position : 0);
}

static uint8_t *const *pages_of(const step *s, int run) {
    return s->m->encoder ? s->ws.scratch_pages + s->ws.first_page[run] : s->b->runs[run].pages;
}

/* The layer's part of pages: encoders have pages of one layer. */
typedef struct {
    page_layer at;
    size_t offset;
} page_part;

static page_part page_part_of(const step *s, int layer) {
    page_part p = {page_layer_of(s->m, &s->m->layer[layer]), 0};
    for (int l = 0; !s->m->encoder && l < layer; l++)
        p.offset += page_layer_of(s->m, &s->m->layer[l]).bytes;
    return p;
}

/* One head after its norm and rotation. */
static const float *turned_head(step *s, const nx_layer *layer, const nx_norm *norm, int row, const float *x, float *to) {
    const nx_model *m = s->m;
    const int n = m->head_dim, half = m->rotated / 2;
    if (is_there(norm)) {
        if (!rms_norm(x, norm->weight, m->norm_eps, n, to))
            mark_out_of_bounds(s, row);
        x = to;
    }
    if (layer->rope < 0 || half == 0)
        return x;
    const float *cosine = s->ws.angle[layer->rope] + (size_t)row * (size_t)m->rotated, *sine = cosine + half;
    for (int i = 0; i < half; i++) {
        const float one = x[i], two = x[half + i];
        to[i] = one * cosine[i] - two * sine[i];
        to[half + i] = two * cosine[i] + one * sine[i];
    }
    if (x != to)
        memcpy(to + 2 * half, x + 2 * half, (size_t)(n - 2 * half) * sizeof *to);
    return to;
}

static void put_query(step *s, const nx_layer *layer, int row, int head, const float *x) {
    float turned[NX_HEAD_DIM_MAX];
    const size_t index = (size_t)row * (size_t)s->m->heads + (size_t)head, depth = (size_t)key_dim(s->m);
    int8_t *to = s->ws.query + index * 2 * depth;
    memset(to, 0, 2 * depth);
    x = turned_head(s, layer, &layer->q_norm, row, x, turned);
    if (!quantise(x, s->m->head_dim, layer->wide_attention, (integers){to, to + depth, 64, 0}, &s->ws.query_scale[index],
                  &s->ws.query_sum[2 * index]))
        mark_out_of_bounds(s, row);
}

/* Bytes of the keys in a record of the log. */
static int record_keys(const step *s, const nx_layer *layer) { return s->m->head_dim * (1 + layer->wide_attention); }

static void put_key(step *s, const nx_layer *layer, const page_layer *at, uint8_t *page, int row, int head, int token,
                    const float *x, uint8_t *record) {
    float turned[NX_HEAD_DIM_MAX];
    int8_t q[2][NX_HEAD_DIM_MAX] = {{0}};
    int32_t sums[2];
    const int64_t depth = key_dim(s->m);
    const size_t group = (size_t)depth * NX_GROUP;
    float *scales = (float *)(page + at->key_scales) + (size_t)head * NX_PAGE_TOKENS;
    x = turned_head(s, layer, &layer->k_norm, row, x, turned);
    if (!quantise(x, s->m->head_dim, layer->wide_attention, (integers){q[0], q[1], 64, 0}, &scales[token], sums))
        mark_out_of_bounds(s, row);
    for (int k = 0, n = s->m->head_dim; record && k < n; k++) {
        const int16_t key = layer->wide_attention ? (int16_t)(256 * q[0][k] + q[1][k]) : q[0][k];
        memcpy(record + k * (1 + layer->wide_attention), &key, 1 + (size_t)layer->wide_attention); /* little-endian */
    }
    if (record)
        memcpy(record + record_keys(s, layer) + s->m->head_dim, &scales[token], sizeof *scales);
    for (int part = 0; part <= layer->wide_attention; part++) {
        uint8_t *to = page + (size_t)head * at->key_head + (size_t)part * at->key_part + packed_offset(token, 0, group);
        for (int64_t k = 0; k < depth; k += 4, to += 64) {
            const uint32_t quad = (uint32_t)quad_at(q[part] + k) ^ 0x80808080u; /* plus 128 */
            memcpy(to, &quad, 4);
        }
    }
}

static void put_value(step *s, const nx_layer *layer, const page_layer *at, uint8_t *page, int row, int head, int token,
                      const float *x, uint8_t *record) {
    int8_t q[NX_HEAD_DIM_MAX];
    int32_t sums[2];
    float *scales = (float *)(page + at->value_scales) + (size_t)head * NX_PAGE_TOKENS;
    if (!quantise(x, s->m->head_dim, 0, (integers){q, NULL, 64, 0}, &scales[token], sums))
        mark_out_of_bounds(s, row);
    if (record) {
        memcpy(record + record_keys(s, layer), q, (size_t)s->m->head_dim);
        memcpy(record + record_keys(s, layer) + s->m->head_dim + sizeof *scales, &scales[token], sizeof *scales);
    }
    uint8_t *to = page + at->values + (size_t)head * at->value_head + packed_offset(0, token, NX_PAGE_TOKENS * NX_GROUP);
    for (int first = 0, dim = s->m->head_dim; first < dim; first += NX_GROUP, to += NX_PAGE_TOKENS * NX_GROUP)
        for (int d = 0, count = min_int(NX_GROUP, dim - first); d < count; d++)
            to[4 * d] = (uint8_t)q[first + d];
}

/* Phase: what the qkv layer put out becomes integers; keys and values go to their pages. An item is a head of keys with its
 * queries. */
static void place_heads(worker *me, int layer_index) {
    step *s = me->s;
    const nx_model *m = s->m;
    const nx_layer *layer = &m->layer[layer_index];
    const page_part part = page_part_of(s, layer_index);
    const int each = m->heads / m->kv_heads, dim = m->head_dim, items = s->rows * m->kv_heads;
    for (int item; (item = next_item(me, 1, items)) < items;) {
        const int row = item / m->kv_heads, head = item % m->kv_heads;
        const float *y = s->ws.y + (size_t)row * (size_t)layer->qkv.n, *keys = y + (size_t)m->heads * (size_t)dim;
        const float *values = keys + (size_t)m->kv_heads * (size_t)dim;
        const int64_t slot = slot_of(s, row);
        uint8_t *page = pages_of(s, s->ws.run_of[row])[slot / NX_PAGE_TOKENS] + part.offset;
        const int token = (int)(slot % NX_PAGE_TOKENS);
        float *committed = head ? NULL : committed_value(s, (value_id){layer_index, NX_QKV}, row);
        uint8_t *record = m->encoder ? NULL : committed_record(s, layer_index, head, row);
        if (committed)
            memcpy(committed, y, (size_t)layer->qkv.n * sizeof *y);
        for (int q = head * each; q < (head + 1) * each; q++)
            put_query(s, layer, row, q, y + (size_t)q * (size_t)dim);
        put_key(s, layer, &part.at, page, row, head, token, keys + (size_t)head * (size_t)dim, record);
        put_value(s, layer, &part.at, page, row, head, token, values + (size_t)head * (size_t)dim, record);
    }
}

/* ---- attention ---- */

/* Queries of one head of keys that are computed together: some consecutive rows of a run, some heads of each. */
typedef struct {
    const nx_layer *layer;
    page_part part;
    uint8_t *const *pages;
    int kv_head, row, rows, head, heads, queries;
    int64_t begin, end;                                      /* positions that any of them sees, from a page's first on */
    int64_t from[NX_QUERIES], to[NX_QUERIES];                /* positions that each sees, counted from `begin` */
    float factor[NX_QUERIES];                                /* query scale times attention scale */
    int32_t correction[2][NX_QUERIES];                       /* 128 times the sums of the integers */
    _Alignas(64) int8_t x[2 * NX_QUERIES * NX_HEAD_DIM_MAX]; /* their integers: high bytes of all, then low bytes */
} query_set;

static void gather_queries(const step *s, query_set *q) {
    const nx_model *m = s->m;
    const size_t depth = (size_t)key_dim(m);
    int64_t first = INT64_MAX;
    q->queries = q->rows * q->heads;
    q->end = 0;
    for (int i = 0; i < q->queries; i++) {
        const int row = q->row + i / q->heads;
        const size_t index = (size_t)row * (size_t)m->heads + (size_t)(q->head + i % q->heads);
        const int64_t slot = slot_of(s, row), window = q->layer->window;
        q->from[i] = !m->encoder && window > 0 && slot >= window ? slot + 1 - window : 0;
        q->to[i] = m->encoder ? s->b->runs[s->ws.run_of[row]].count : slot + 1;
        q->factor[i] = s->ws.query_scale[index] * m->attention_scale;
        for (int part = 0; part <= q->layer->wide_attention; part++) {
            memcpy(q->x + ((size_t)part * (size_t)q->queries + (size_t)i) * depth, s->ws.query + (2 * index + (size_t)part) * depth,
                   depth);
            q->correction[part][i] = 128 * s->ws.query_sum[2 * index + (size_t)part];
        }
        first = q->from[i] < first ? q->from[i] : first;
        q->end = larger(q->end, q->to[i]);
    }
    q->begin = first / NX_PAGE_TOKENS * NX_PAGE_TOKENS;
    for (int i = 0; i < q->queries; i++) {
        q->from[i] -= q->begin;
        q->to[i] -= q->begin;
    }
}

static uint8_t *page_at(const query_set *q, int64_t position) { return q->pages[position / NX_PAGE_TOKENS] + q->part.offset; }

/* Scores of all queries and 32 positions: scores[query * stride + position]. */
static void score_block(const step *s, const query_set *q, const uint8_t *keys, const float *key_scales, float *scores,
                        size_t stride) {
    _Alignas(64) int32_t acc[2][2 * NX_QUERIES * NX_BLOCK];
    const nx_model *m = s->m;
    const int wide = q->layer->wide_attention, rows = q->queries * (1 + wide);
    const size_t depth = (size_t)key_dim(m), group = depth * NX_GROUP;
    for (int part = 0; part <= wide; part++) {
        memset(acc[part], 0, (size_t)rows * NX_BLOCK * sizeof(int32_t));
        dot(SIGNED_X, 0, q->x, depth, rows, keys + (size_t)part * q->part.at.key_part, group, (int)(depth / 4), acc[part]);
    }
    for (int i = 0; i < q->queries; i++) {
        float *to = scores + (size_t)i * stride;
        const int32_t high = q->correction[0][i];
        const float factor = q->factor[i];
        if (wide) {
            /* At most 65536 * 127 * 127 * 256 and less: exact in float64. */
            const int32_t low = q->correction[1][i], *hh = acc[0] + i * NX_BLOCK, *lh = hh + q->queries * NX_BLOCK;
            const int32_t *hl = acc[1] + i * NX_BLOCK, *ll = hl + q->queries * NX_BLOCK;
            for (int t = 0; t < NX_BLOCK; t++) {
                const double sum = 65536.0 * (double)(hh[t] - high) + 256.0 * ((double)(hl[t] - high) + (double)(lh[t] - low));
                to[t] = ((float)(sum + (double)(ll[t] - low)) * factor) * key_scales[t];
            }
        } else {
            for (int t = 0; t < NX_BLOCK; t++)
                to[t] = ((float)(acc[0][i * NX_BLOCK + t] - high) * factor) * key_scales[t];
        }
        if (m->attention_cap != 0)
            for (int t = 0; t < NX_BLOCK; t++)
                to[t] = cap(m, to[t], m->attention_cap);
    }
}

static void score(const step *s, const query_set *q, float *scores, size_t stride) {
    const size_t half = (size_t)key_dim(s->m) * NX_BLOCK; /* bytes of 32 positions */
    for (int64_t position = q->begin; position < q->end; position += NX_PAGE_TOKENS) {
        const uint8_t *page = page_at(q, position), *keys = page + (size_t)q->kv_head * q->part.at.key_head;
        const float *scales = (const float *)(page + q->part.at.key_scales) + (size_t)q->kv_head * NX_PAGE_TOKENS;
        /* Sessions in a batch come from all over memory: their values, and the keys of the next page, are asked for meanwhile. */
        fetch_lines(page + q->part.at.values + (size_t)q->kv_head * q->part.at.value_head, q->part.at.value_head / 64);
        if (position + NX_PAGE_TOKENS < q->end)
            fetch_lines(page_at(q, position + NX_PAGE_TOKENS) + (size_t)q->kv_head * q->part.at.key_head, q->part.at.key_head / 64);
        for (int block = 0; block < 2 && position + block * NX_BLOCK < q->end; block++)
            score_block(s, q, keys + (size_t)block * half, scales + block * NX_BLOCK,
                        scores + (position - q->begin) + block * NX_BLOCK, stride);
    }
}

/* Exponentials of one query's scores times the scales of values: b. */
typedef struct {
    double total;   /* E, an integer */
    double largest; /* B */
} softmax;

static softmax weigh(const step *s, const query_set *q, int i, const float *scores, double *b) {
    const nx_model *m = s->m;
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t t = q->from[i]; t < q->to[i]; t++)
        most = scores[t] > most ? scores[t] : most;
    softmax result = {0, 0};
    for (int64_t t = q->from[i]; t < q->to[i];) {
        const int64_t page = t / NX_PAGE_TOKENS * NX_PAGE_TOKENS;
        const int64_t end = page + NX_PAGE_TOKENS < q->to[i] ? page + NX_PAGE_TOKENS : q->to[i];
        const float *scales =
            (const float *)(page_at(q, q->begin + page) + q->part.at.value_scales) + (size_t)q->kv_head * NX_PAGE_TOKENS;
        double total = 0, highest = 0;
#pragma omp simd reduction(+ : total) reduction(max : highest)
        for (int64_t u = t; u < end; u++) {
            const double e = exp_neg(m, most - scores[u]), weighed = e * (double)scales[u - page];
            total += rint_double(e * 0x1p+24);
            b[u] = weighed;
            highest = weighed > highest ? weighed : highest;
        }
        result.total += total;
        result.largest = highest > result.largest ? highest : result.largest;
        t = end;
    }
    return result;
}

/* The integers p <= 32767 of one query, as high and low bytes; zeros where it sees nothing. */
static void weights_to_bytes(const query_set *q, int i, int64_t length, double largest_b, const double *b, uint8_t *high,
                             uint8_t *low) {
    const double factor = 32767.0 / largest_b;
    const int64_t from = q->from[i], to = q->to[i];
    memset(high, 0, (size_t)from);
    memset(low, 0, (size_t)from);
#pragma omp simd
    for (int64_t t = from; t < to; t++) {
        const int32_t p = (int32_t)rint_double(b[t] * factor);
        high[t] = (uint8_t)(p >> 8);
        low[t] = (uint8_t)p;
    }
    memset(high + to, 0, (size_t)(length - to));
    memset(low + to, 0, (size_t)(length - to));
}

/* Pages whose sums fit into int32: 1,024 * 64 * 255 * 128 < 2^31. */
#define PAGES_BEFORE_SPILL 1024

/* Sums over positions of p * value for all queries and up to 32 dimensions from `dim` on. */
static void sum_values(const query_set *q, int dim, size_t second, const uint8_t *parts, size_t stride, int64_t (*sums)[NX_BLOCK]) {
    const int64_t seen = q->end - q->begin;
    _Alignas(64) int32_t acc[2 * NX_QUERIES * NX_BLOCK];
    const size_t offset = q->part.at.values + (size_t)q->kv_head * q->part.at.value_head + (size_t)dim * NX_PAGE_TOKENS;
    memset(sums, 0, (size_t)q->queries * sizeof *sums);
    for (int64_t first = 0; first < seen; first += PAGES_BEFORE_SPILL * NX_PAGE_TOKENS) {
        const int64_t end = first + PAGES_BEFORE_SPILL * NX_PAGE_TOKENS < seen ? first + PAGES_BEFORE_SPILL * NX_PAGE_TOKENS : seen;
        memset(acc, 0, 2 * (size_t)q->queries * NX_BLOCK * sizeof *acc);
        for (int64_t t = first; t < end; t += NX_PAGE_TOKENS)
            dot(UNSIGNED_X, 0, (const int8_t *)parts + t, stride, 2 * q->queries, page_at(q, q->begin + t) + offset, second,
                t + NX_PAGE_TOKENS <= seen ? NX_PAGE_TOKENS / 4 : (int)((seen - t + 3) / 4), acc);
        for (int i = 0; i < q->queries; i++)
            for (int c = 0; c < NX_BLOCK; c++)
                sums[i][c] += 256 * (int64_t)acc[i * NX_BLOCK + c] + acc[(q->queries + i) * NX_BLOCK + c];
    }
}

static void attend(const step *s, const thread_space *space, query_set *q) {
    const nx_model *m = s->m;
    const size_t stride = (size_t)s->ws.longest;
    float factor[NX_QUERIES];
    gather_queries(s, q);
    const int64_t length = pad_to(q->end - q->begin, NX_PAGE_TOKENS);
    score(s, q, space->scores, stride);
    for (int i = 0; i < q->queries; i++) {
        const size_t at = (size_t)i * stride;
        const softmax soft = weigh(s, q, i, space->scores + at, space->weights + at);
        weights_to_bytes(q, i, length, soft.largest, space->weights + at, space->parts + at,
                         space->parts + (size_t)q->queries * stride + at);
        factor[i] = (float)((soft.largest * 0x1p+24) / (soft.total * 32767.0));
    }
    for (int dim = 0; dim < m->head_dim; dim += NX_BLOCK) {
        int64_t sums[NX_QUERIES][NX_BLOCK];
        const int count = min_int(NX_BLOCK, m->head_dim - dim);
        /* The last 16 dimensions may have no others beside them: they are read twice then. */
        sum_values(q, dim, count > NX_GROUP ? NX_PAGE_TOKENS * NX_GROUP : 0, space->parts, stride, sums);
        for (int i = 0; i < q->queries; i++) {
            const size_t row = (size_t)(q->row + i / q->heads), head = (size_t)(q->head + i % q->heads);
            float *out = s->ws.attention + (row * (size_t)m->heads + head) * (size_t)m->head_dim + dim;
            for (int c = 0; c < count; c++)
                out[c] = (float)(double)sums[i][c] * factor[i]; /* below 2^53: exact before it is rounded once */
        }
    }
}

/* Phase: an item is a block of queries of one head of keys. */
static void attention(worker *me, int layer_index) {
    const step *s = me->s;
    const nx_model *m = s->m;
    const int each = m->heads / m->kv_heads, items = s->query_blocks * m->kv_heads * s->head_blocks;
    const page_part part = page_part_of(s, layer_index);
    for (int item; (item = next_item(me, 1, items)) < items;) {
        const query_block *block = &s->ws.blocks[item / (m->kv_heads * s->head_blocks)];
        const int rest = item % (m->kv_heads * s->head_blocks), kv_head = rest / s->head_blocks;
        const int skipped = rest % s->head_blocks * s->heads_together;
        query_set q;
        q.layer = &m->layer[layer_index];
        q.part = part;
        q.pages = pages_of(s, block->run);
        q.kv_head = kv_head;
        q.row = block->row;
        q.rows = block->rows;
        q.head = kv_head * each + skipped;
        q.heads = min_int(s->heads_together, each - skipped);
        attend(s, me->space, &q);
    }
}

/* ---- the whole ---- */

static void embed(const nx_model *m, uint32_t id, int64_t position, float *x) {
    const nx_linear *w = &m->embed;
    const uint8_t *quads = w->weights + packed_offset(id, 0, group_bytes(w->k));
    const float scale = w->scale[id];
    int8_t row[64];
    for (int first = 0; first < w->k; first += 64, quads += 16 * 64) {
        const int count = min_int(64, w->k - first);
        for (int i = 0; i < 16; i++) {
            const uint32_t quad = (uint32_t)quad_at(quads + 64 * i) ^ 0x80808080u;
            memcpy(row + 4 * i, &quad, 4);
        }
        for (int i = 0; i < count; i++)
            x[first + i] = (float)row[i] * scale;
    }
    for (int i = 0; m->embed_scale != 0 && i < w->k; i++)
        x[i] = x[i] * m->embed_scale;
    const float *positions = m->encoder ? m->position + (size_t)position * (size_t)w->k : NULL;
    for (int i = 0; positions && i < w->k; i++)
        x[i] = (x[i] + m->type[i]) + positions[i];
}

static void set_angles(const step *s, int rope, int row) {
    const int half = s->m->rotated / 2;
    const int64_t position = s->ws.position[row];
    const double *a = s->m->rope[rope].coarse + (size_t)(position / 256) * (size_t)(2 * half);
    const double *b = s->m->rope[rope].fine + (size_t)(position % 256) * (size_t)(2 * half);
    float *cosine = s->ws.angle[rope] + (size_t)row * (size_t)s->m->rotated, *sine = cosine + half;
    for (int i = 0; i < half; i++) {
        const double ca = a[2 * i], sa = a[2 * i + 1], cb = b[2 * i], sb = b[2 * i + 1];
        cosine[i] = (float)(ca * cb - sa * sb);
        sine[i] = (float)(sa * cb + ca * sb);
    }
}

/* Phase: rows as they enter the first layer. */
static void begin_rows(worker *me) {
    step *s = me->s;
    const nx_model *m = s->m;
    const size_t n = (size_t)m->hidden;
    for (int row; (row = next_item(me, 1, s->rows)) < s->rows;) {
        float *x = x_row(s, row);
        if (m->embed.weights && s->b->ids) {
            embed(m, s->b->ids[row], s->ws.position[row], x);
            if (m->encoder)
                normalise(s, &m->embed_norm, row, x, m->hidden, x);
        } else {
            memcpy(x, s->b->states + (size_t)row * n, n * sizeof *x);
        }
        for (int rope = 0; rope < 2; rope++)
            if (m->rotated && m->rope[rope].coarse)
                set_angles(s, rope, row);
    }
}

/* ---- hashes ---- */

/* Leaves that a thread hashes at once. */
#define LEAVES 256

/* Leaf `index` of layers [first, first + count): those of one value of all layers follow one another, since they are equally long;
 * records come last. */
static nx_leaf held_leaf(const step *s, int first, int count, int index) {
    const nx_model *m = s->m;
    const nx_commit *commit = s->b->commit;
    const int rows = s->committed_rows, each = count * rows;
    const size_t hash = NX_HASH_BYTES;
    if (index < NX_VALUES * each) {
        const int op = index / each, number = index % each / rows, row = index % each % rows, layer = first + number;
        const committed_layer c = committed_layer_of(m, &m->layer[layer]);
        const float *values = commit->values ? commit->values + (size_t)layer * s->ws.held_floats
                                             : s->ws.held + (size_t)number * s->ws.held_floats;
        return (nx_leaf){(const uint8_t *)(values + c.before[op] * rows + c.width[op] * row), (uint64_t)c.width[op] * sizeof(float),
                         commit->cells + (((size_t)layer * NX_VALUES + (size_t)op) * (size_t)rows + (size_t)row) * hash};
    }
    index -= NX_VALUES * each;
    const int number = index / (m->kv_heads * rows), at = index % (m->kv_heads * rows), layer = first + number;
    const size_t record = (size_t)committed_layer_of(m, &m->layer[layer]).record;
    const uint8_t *records = commit->values ? commit->logged + (size_t)layer * s->ws.held_record_bytes
                                            : s->ws.held_records + (size_t)number * s->ws.held_record_bytes;
    return (nx_leaf){records + (size_t)at * record, record,
                     commit->records + ((size_t)layer * (size_t)m->kv_heads * (size_t)rows + (size_t)at) * hash};
}

/* Phase: the hashes of what layers [first, first + count) have put down. `first` is a multiple of ws.held_layers. */
static void hash_layers(worker *me, int first, int count) {
    const step *s = me->s;
    const int leaves = count * s->committed_rows * (NX_VALUES + (s->m->encoder ? 0 : s->m->kv_heads));
    const int share = s->team.threads == 1 ? LEAVES : leaves / (4 * s->team.threads), chunk = max_int(16, min_int(share, LEAVES));
    nx_leaf list[LEAVES];
    for (int at; (at = next_item(me, chunk, leaves)) < leaves;) {
        const int many = min_int(chunk, leaves - at);
        for (int i = 0; i < many; i++)
            list[i] = held_leaf(s, first, count, at + i);
        JOIN(nx_hash_, NX_VARIANT)(list, many, NX_LEAF);
    }
}

static nx_leaf logits_leaf(const step *s, int index) {
    const size_t n = (size_t)s->m->head.n;
    return (nx_leaf){(const uint8_t *)(s->b->logits_out + (size_t)s->ws.committed_logit[index] * n), n * sizeof(float),
                     s->b->commit->logits + (size_t)index * NX_HASH_BYTES};
}

/* Phases: the hashes of logits, each by several threads. */
static void hash_logits(worker *me) {
    const step *s = me->s;
    const int slices = (int)slices_of((uint64_t)s->m->head.n * sizeof(float)), items = s->committed_logits * slices;
    for (int item; (item = next_item(me, 1, items)) < items;) {
        const nx_leaf leaf = logits_leaf(s, item / slices);
        JOIN(nx_hash_slice_, NX_VARIANT)(&leaf, (uint64_t)(item % slices), s->ws.slices + (size_t)item * NX_HASH_BYTES);
    }
    for (int index; (index = next_item(me, 1, s->committed_logits)) < s->committed_logits;) {
        const nx_leaf leaf = logits_leaf(s, index);
        JOIN(nx_hash_join_, NX_VARIANT)(&leaf, s->ws.slices + (size_t)index * (size_t)slices * NX_HASH_BYTES);
    }
}

static void run_layer(worker *me, int index, const block_end *before) {
    const step *s = me->s;
    const nx_model *m = s->m;
    const nx_layer *layer = &m->layer[index];
    const nx_trace trace = s->b->trace ? s->b->trace[index] : (nx_trace){0};
    const size_t hidden = (size_t)m->hidden;
    const target to_x = {s->ws.x, hidden, 1, 0}, to_y = {s->ws.y, hidden, 0, 0};

    const nx_norm *attention_end = m->encoder ? &layer->attention_norm : &layer->post_attention_norm;
    const nx_norm *mlp_end = m->encoder ? &layer->mlp_norm : &layer->post_mlp_norm;
    const block_end attention_block = {{index, NX_O}, attention_end};

    enter_block(me, before, &layer->attention_norm, &layer->qkv);
    if (s->committed_rows && index && index % s->ws.held_layers == 0)
        hash_layers(me, index - s->ws.held_layers, s->ws.held_layers);
    linear(me, &layer->qkv, s->rows, (target){s->ws.y, (size_t)layer->qkv.n, 0, 0}, (trace_at){trace.qkv, layer->qkv.n, 0});
    place_heads(me, index);
    attention(me, index);
    quantise_rows(me, &layer->o, s->ws.attention, (value_id){index, NX_ATTENTION}, trace.attention);
    linear(me, &layer->o, s->rows, is_there(attention_end) ? to_y : to_x, (trace_at){trace.o, layer->o.n, 0});

    enter_block(me, &attention_block, &layer->mlp_norm, &layer->up);
    gated_linear(me, layer, trace.gate_up);
    quantise_rows(me, &layer->down, s->ws.h, (value_id){index, NX_GATE_UP}, NULL);
    linear(me, &layer->down, s->rows, is_there(mlp_end) ? to_y : to_x, (trace_at){trace.down, layer->down.n, 0});
}

/* Phase: the last norm that is still to come, the check of what leaves, and the rows themselves where the stage puts them out. */
static void end_rows(worker *me, const block_end *last) {
    step *s = me->s;
    const nx_model *m = s->m;
    const size_t n = (size_t)m->hidden;
    for (int row; (row = next_item(me, 1, s->rows)) < s->rows;) {
        float *x = x_row(s, row), a;
        check_token(s, row);
        end_block(s, last, row, me->space->row);
        if (!largest(x, m->hidden, &a))
            mark_out_of_bounds(s, row);
        if (s->b->states_out)
            memcpy(s->b->states_out + (size_t)row * n, x, n * sizeof *x);
    }
}

/* Phases: the logits of the rows that they are asked of. */
static void run_head(worker *me) {
    step *s = me->s;
    float *scratch = me->space->row;
    const nx_linear *w = &s->m->head;
    const operand o = operand_of(w, s->logit_rows);
    for (int index; (index = next_item(me, 1, s->logit_rows)) < s->logit_rows;) {
        const int row = s->ws.logit_row[index];
        normalise(s, &s->m->final_norm, row, x_row(s, row), s->m->hidden, scratch);
        if (!quantise_token(s, w, &o, index, scratch))
            mark_out_of_bounds(s, row);
    }
    linear(me, w, s->logit_rows, (target){s->b->logits_out, (size_t)w->n, 0, s->m->final_cap}, (trace_at){0});
}

/* What every thread of the team runs. */
static void run_step(step *s, int thread) {
    const nx_model *m = s->m;
    worker me = {s, &s->ws.thread[thread], {0, 0, 0}};
    block_end before = {{-1, NX_DOWN}, NULL};
    begin_rows(&me);
    for (int layer = 0; layer < m->layers; layer++) {
        if (is_cancelled(&s->team))
            return;
        run_layer(&me, layer, &before);
        before = (block_end){{layer, NX_DOWN}, m->encoder ? &m->layer[layer].mlp_norm : &m->layer[layer].post_mlp_norm};
    }
    if (is_cancelled(&s->team))
        return;
    end_rows(&me, &before);
    if (s->committed_rows && m->layers) {
        const int first = (m->layers - 1) / s->ws.held_layers * s->ws.held_layers;
        hash_layers(&me, first, m->layers - first);
    }
    if (m->head.weights && s->logit_rows)
        run_head(&me);
    if (s->committed_logits)
        hash_logits(&me);
}

/* ---- entry ---- */

/* Counts rows and checks everything of a batch that could lead out of an array. */
static int32_t check_batch(const nx_model *m, const nx_batch *b, int64_t *rows, int64_t *longest, int64_t *committed) {
    *rows = *longest = *committed = 0;
    const int takes_ids = m->embed.weights && b->ids;
    if (!b->runs || b->run_count < 1 || b->run_count > NX_ROWS_MAX || b->threads < 1 || b->threads > NX_THREADS_MAX ||
        !b->workspace)
        return NX_BAD_ARGUMENT;
    if ((takes_ids == 0) == (b->states == NULL) || (uintptr_t)b->workspace % 64)
        return NX_BAD_ARGUMENT;
    for (int32_t i = 0; i < b->run_count; i++) {
        const nx_run *run = &b->runs[i];
        if (run->count < 1 || run->count > NX_ROWS_MAX || run->position < 0 || run->position > NX_LONGEST - run->count)
            return NX_BAD_ARGUMENT;
        const int64_t end = run->position + run->count;
        if ((!m->encoder && !run->pages) || (run->logits && (!m->head.weights || !b->logits_out)))
            return NX_BAD_ARGUMENT;
        if (m->encoder && takes_ids && end > m->positions)
            return NX_BAD_ARGUMENT;
        for (int rope = 0; rope < 2; rope++)
            if (m->rotated && m->rope[rope].coarse && end > m->rope[rope].coarse_rows * 256)
                return NX_BAD_ARGUMENT;
        *rows += run->count;
        *committed += b->commit && run->commit ? run->count : 0;
        *longest = larger(*longest, m->encoder ? run->count : end);
    }
    if (*rows > NX_ROWS_MAX || (b->commit && !m->key))
        return NX_BAD_ARGUMENT;
    if (*committed && (!b->commit->cells || (!m->encoder && !b->commit->records) || (m->head.weights && !b->commit->logits) ||
                       (b->commit->values && !m->encoder && !b->commit->logged)))
        return NX_BAD_ARGUMENT;
    for (int64_t i = 0; takes_ids && i < *rows; i++)
        if (b->ids[i] >= (uint32_t)m->embed.n)
            return NX_BAD_ARGUMENT;
    return NX_OK;
}

/* Lists what the phases go through: rows with their runs and positions, blocks of queries, rows that logits are asked of, scratch
 * pages. */
static void plan_batch(step *s) {
    const nx_model *m = s->m;
    const int each = m->heads / m->kv_heads;
    s->heads_together = min_int(each, NX_QUERIES);
    s->head_blocks = (each + s->heads_together - 1) / s->heads_together;
    const int rows_together = NX_QUERIES / s->heads_together;
    int64_t pages = 0;
    for (int i = 0; i < s->b->run_count; i++) {
        nx_run *run = &s->b->runs[i];
        run->status = NX_OK;
        for (int t = 0; t < run->count; t += rows_together)
            s->ws.blocks[s->query_blocks++] = (query_block){i, s->rows + t, min_int(rows_together, run->count - t)};
        if (m->encoder) {
            s->ws.first_page[i] = pages;
            for (int t = 0; t < run->count; t += NX_PAGE_TOKENS, pages++)
                s->ws.scratch_pages[pages] = s->ws.scratch + (size_t)pages * s->ws.scratch_page_bytes;
        }
        for (int t = 0; t < run->count; t++, s->rows++) {
            s->ws.run_of[s->rows] = i;
            s->ws.committed_row[s->rows] = s->b->commit && run->commit ? s->committed_rows++ : -1;
            s->ws.position[s->rows] = run->position + t;
            if (run->logits == NX_ALL_LOGITS || (run->logits == NX_LAST_LOGITS && t == run->count - 1)) {
                if (s->b->commit && run->commit)
                    s->ws.committed_logit[s->committed_logits++] = s->logit_rows;
                s->ws.logit_row[s->logit_rows++] = s->rows;
            }
        }
    }
    memset(s->ws.expected, 0, 2 * (size_t)s->rows * sizeof *s->ws.expected);
    memset(s->ws.found, 0, 2 * (size_t)s->rows * sizeof *s->ws.found);
}

/* A team costs some microseconds: less than this many multiplications are done before it has come together. */
#define TEAM_FROM (INT64_C(1) << 22)

static int useful_threads(const nx_model *m, const nx_batch *b, int64_t rows) {
    int64_t weights = (int64_t)m->head.n * m->head.k;
    for (int32_t l = 0; l < m->layers; l++) {
        const nx_layer *layer = &m->layer[l];
        weights += (int64_t)layer->qkv.n * layer->qkv.k + (int64_t)layer->o.n * layer->o.k +
                   (int64_t)layer->gate.n * layer->gate.k + (int64_t)layer->up.n * layer->up.k +
                   (int64_t)layer->down.n * layer->down.k;
    }
    return weights * rows < TEAM_FROM ? 1 : b->threads;
}

int32_t JOIN(nx_step_, NX_VARIANT)(const nx_model *m, nx_batch *b) {
    step s = {.m = m, .b = b};
    int64_t rows, longest, committed;
    const int32_t checked = check_batch(m, b, &rows, &longest, &committed);
    if (checked != NX_OK)
        return checked;
    if (lay_out_workspace(m, rows, b->run_count, longest, b->threads, committed, NULL, &s.ws) > b->workspace_bytes)
        return NX_WORKSPACE;
    lay_out_workspace(m, rows, b->run_count, longest, b->threads, committed, b->workspace, &s.ws);
    plan_batch(&s);
    s.team.cancel = b->cancel;
    s.team.threads = 1;
#ifdef _OPENMP
    const int threads = useful_threads(m, b, rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp single
        s.team.threads = omp_get_num_threads(); /* may be fewer than asked for */
        const float_control before = set_float_control();
        run_step(&s, omp_get_thread_num());
        restore_float_control(before);
    }
#else
    const float_control before = set_float_control();
    run_step(&s, 0);
    restore_float_control(before);
#endif
    if (is_cancelled(&s.team))
        return NX_CANCELLED;
    for (int i = 0; i < s.logit_rows; i++) /* the head's */
        check_token(&s, i);
    if (s.wrong)
        return NX_WRONG;
    for (int32_t i = 0; i < b->run_count; i++)
        if (b->runs[i].status != NX_OK)
            return NX_BOUNDS;
    return NX_OK;
}
