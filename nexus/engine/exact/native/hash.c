/* BLAKE3 in lanes. A chunk of 1,024 bytes is 16 blocks that need one another; so each lane has a chunk of its own, and it does not
 * matter which inputs they come from. Chunks are put in the order of their lengths, then pairs of chaining values are joined level by
 * level, those of all inputs together. */
#include <string.h>

#include "hash.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "rows and hashes are little-endian: this needs a processor that is, too"
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b)  JOIN_(a, b)
#define INLINE      static inline __attribute__((always_inline))

#if defined(NX_PORTABLE)
#define LANES 4
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define BLOCK_BYTES 64
#define WORDS       8 /* of a chaining value */
#define WAVE        512 /* chunks that are hashed together at most; a power of two */

enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };

typedef uint32_t lanes __attribute__((vector_size(4 * LANES)));

static const uint32_t INITIAL[WORDS] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

/* ---- blocks into lanes ---- */

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector) && !defined(NX_PORTABLE)
#define HAS_SHUFFLES
#endif
#endif

#ifdef HAS_SHUFFLES
typedef uint32_t quad __attribute__((vector_size(16)));

INLINE quad quad_from(const uint8_t *from) {
    quad q;
    memcpy(&q, from, sizeof q);
    return q;
}

/* The quads of four lanes side by side: first + 0, first + 4, ... */
#if LANES == 4
#define SHUFFLED(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#define QUADS_FROM(at, lane)       quad_from(block[lane] + (at))
#elif LANES == 8
#define SHUFFLED(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l, 4 + i, 4 + j, 4 + k, 4 + l)
#define QUADS_FROM(at, lane)                                                                                                       \
    __builtin_shufflevector(quad_from(block[lane] + (at)), quad_from(block[4 + (lane)] + (at)), 0, 1, 2, 3, 4, 5, 6, 7)
#else
typedef uint32_t octet __attribute__((vector_size(32)));
#define SHUFFLED(a, b, i, j, k, l)                                                                                                 \
    __builtin_shufflevector(a, b, i, j, k, l, 4 + i, 4 + j, 4 + k, 4 + l, 8 + i, 8 + j, 8 + k, 8 + l, 12 + i, 12 + j, 12 + k, 12 + l)
#define PAIR_FROM(at, lane)                                                                                                        \
    (octet) __builtin_shufflevector(quad_from(block[lane] + (at)), quad_from(block[4 + (lane)] + (at)), 0, 1, 2, 3, 4, 5, 6, 7)
#define QUADS_FROM(at, lane)                                                                                                       \
    __builtin_shufflevector(PAIR_FROM(at, lane), PAIR_FROM(at, 8 + (lane)), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#endif
#define EVEN(a, b)      SHUFFLED(a, b, 0, LANES, 1, LANES + 1)
#define ODD(a, b)       SHUFFLED(a, b, 2, LANES + 2, 3, LANES + 3)
#define LOW_PAIR(a, b)  SHUFFLED(a, b, 0, 1, LANES, LANES + 1)
#define HIGH_PAIR(a, b) SHUFFLED(a, b, 2, 3, LANES + 2, LANES + 3)

/* words[w] = word w of the block of every lane, from `at` bytes into it. */
INLINE void load_blocks(const uint8_t *const block[LANES], size_t at, lanes words[16]) {
    for (int q = 0; q < 4; q++, at += 16) {
        const lanes a = QUADS_FROM(at, 0), b = QUADS_FROM(at, 1), c = QUADS_FROM(at, 2), d = QUADS_FROM(at, 3);
        const lanes ab = EVEN(a, b), ab_high = ODD(a, b), cd = EVEN(c, d), cd_high = ODD(c, d);
        words[4 * q] = LOW_PAIR(ab, cd);
        words[4 * q + 1] = HIGH_PAIR(ab, cd);
        words[4 * q + 2] = LOW_PAIR(ab_high, cd_high);
        words[4 * q + 3] = HIGH_PAIR(ab_high, cd_high);
    }
}
#else
INLINE void load_blocks(const uint8_t *const block[LANES], size_t at, lanes words[16]) {
    uint32_t turned[16][LANES];
    for (int lane = 0; lane < LANES; lane++)
        for (int w = 0; w < 16; w++)
            memcpy(&turned[w][lane], block[lane] + at + 4 * w, 4);
    memcpy(words, turned, sizeof turned);
}
#endif

/* ---- compression ---- */

#define ROTATED(v, n) ((v) >> (n) | (v) << (32 - (n)))
#define MIX(a, b, c, d, x, y)                                                                                                      \
    do {                                                                                                                           \
        v[a] = v[a] + v[b] + m[x];                                                                                                 \
        v[d] = ROTATED(v[d] ^ v[a], 16);                                                                                           \
        v[c] = v[c] + v[d];                                                                                                        \
        v[b] = ROTATED(v[b] ^ v[c], 12);                                                                                           \
        v[a] = v[a] + v[b] + m[y];                                                                                                 \
        v[d] = ROTATED(v[d] ^ v[a], 8);                                                                                            \
        v[c] = v[c] + v[d];                                                                                                        \
        v[b] = ROTATED(v[b] ^ v[c], 7);                                                                                            \
    } while (0)
/* The numbers are the places of the message's words. */
#define ROUND(a, b, c, d, e, f, g, h, i, j, k, l, n, o, p, q)                                                                      \
    do {                                                                                                                           \
        MIX(0, 4, 8, 12, a, b);                                                                                                    \
        MIX(1, 5, 9, 13, c, d);                                                                                                    \
        MIX(2, 6, 10, 14, e, f);                                                                                                   \
        MIX(3, 7, 11, 15, g, h);                                                                                                   \
        MIX(0, 5, 10, 15, i, j);                                                                                                   \
        MIX(1, 6, 11, 12, k, l);                                                                                                   \
        MIX(2, 7, 8, 13, n, o);                                                                                                    \
        MIX(3, 4, 9, 14, p, q);                                                                                                    \
    } while (0)

typedef struct {
    lanes counter_low, counter_high, bytes, flags;
} block_state;

/* One block of every lane into its chaining value h. */
INLINE void compress(lanes h[WORDS], const uint8_t *const block[LANES], size_t at, const block_state *s) {
    lanes m[16], v[16];
    load_blocks(block, at, m);
    for (int i = 0; i < WORDS; i++)
        v[i] = h[i];
    for (int i = 0; i < 4; i++)
        v[8 + i] = (lanes){0} + INITIAL[i];
    v[12] = s->counter_low;
    v[13] = s->counter_high;
    v[14] = s->bytes;
    v[15] = s->flags;
    ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8);
    ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1);
    ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6);
    ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4);
    ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7);
    ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13);
    for (int i = 0; i < WORDS; i++)
        h[i] = v[i] ^ v[i + 8];
}

INLINE void begin(lanes h[WORDS]) {
    for (int i = 0; i < WORDS; i++)
        h[i] = (lanes){0} + INITIAL[i];
}

/* ---- chunks ---- */

/* Consecutive chunks of one input, all of them or a whole subtree. */
typedef struct {
    const nx_leaf *leaf;
    uint64_t first;
    uint32_t chunks, start; /* start: where their chaining values lie in the wave */
} part;

typedef struct {
    const nx_leaf *leaf;
    uint64_t number;
    uint32_t place; /* of its chaining value */
    uint16_t blocks;
    uint16_t last_flags;
} chunk;

static int blocks_in(const nx_leaf *leaf, uint64_t number) {
    const uint64_t left = leaf->bytes + 1 - number * NX_CHUNK_BYTES;
    return left >= NX_CHUNK_BYTES ? NX_CHUNK_BYTES / BLOCK_BYTES : (int)((left + BLOCK_BYTES - 1) / BLOCK_BYTES);
}

/* Block number b of a chunk, in `scratch` where it does not lie in memory as a whole; its bytes in `bytes`. */
static const uint8_t *block_of(const chunk *c, int b, uint8_t prefix, uint8_t scratch[BLOCK_BYTES], uint32_t *bytes) {
    const uint64_t at = c->number * NX_CHUNK_BYTES + (uint64_t)b * BLOCK_BYTES, left = c->leaf->bytes + 1 - at;
    *bytes = left < BLOCK_BYTES ? (uint32_t)left : BLOCK_BYTES;
    if (at && left >= BLOCK_BYTES)
        return c->leaf->data + at - 1;
    memset(scratch, 0, BLOCK_BYTES);
    if (at)
        memcpy(scratch, c->leaf->data + at - 1, *bytes);
    else if (*bytes > 1)
        memcpy(scratch + 1, c->leaf->data, *bytes - 1);
    if (!at)
        scratch[0] = prefix;
    return scratch;
}

/* Up to LANES chunks, in falling order of their blocks. */
static void hash_chunks(const chunk *chunks, int count, uint8_t prefix, uint32_t (*values)[WORDS]) {
    uint8_t scratch[LANES][BLOCK_BYTES] = {{0}};
    const uint8_t *block[LANES];
    const chunk *of[LANES];
    lanes h[WORDS];
    block_state s = {{0}, {0}, {0}, {0}};
    for (int lane = 0; lane < LANES; lane++) { /* lanes without a chunk do what the last one does */
        of[lane] = &chunks[lane < count ? lane : count - 1];
        s.counter_low[lane] = (uint32_t)of[lane]->number;
        s.counter_high[lane] = (uint32_t)(of[lane]->number >> 32);
    }
    begin(h);
    /* Blocks that all lanes have whole, without a flag, and in memory as they are: neither the first nor any last one. */
    const int most = chunks[0].blocks, plain = chunks[count - 1].blocks - 1;
    for (int b = 0; b < most; b++) {
        lanes going = {0}, before[WORDS];
        for (int lane = 0; lane < LANES; lane++) {
            const chunk *c = of[lane];
            uint32_t bytes;
            if (b >= c->blocks) {
                block[lane] = scratch[lane]; /* the lane is done: any block will do */
                continue;
            }
            block[lane] = block_of(c, b, prefix, scratch[lane], &bytes);
            s.bytes[lane] = bytes;
            s.flags[lane] = (b == 0 ? CHUNK_START : 0u) | (b == c->blocks - 1 ? c->last_flags : 0u);
            going[lane] = UINT32_MAX;
        }
        memcpy(before, h, sizeof h);
        compress(h, block, 0, &s);
        for (int i = 0; i < WORDS; i++)
            h[i] = (h[i] & going) | (before[i] & ~going);
        if (b == 0 && plain > 1) {
            for (int lane = 0; lane < LANES; lane++)
                block[lane] = of[lane]->leaf->data + of[lane]->number * NX_CHUNK_BYTES - 1;
            s.flags = (lanes){0};
            s.bytes = (lanes){0} + BLOCK_BYTES;
            for (b = 1; b < plain; b++) {
                for (int lane = 0; lane < LANES; lane++)
                    __builtin_prefetch(block[lane] + (b + 3) * BLOCK_BYTES, 0, 3);
                compress(h, block, (size_t)b * BLOCK_BYTES, &s);
            }
            b--;
        }
    }
    for (int i = 0; i < WORDS; i++)
        for (int lane = 0; lane < count; lane++)
            values[of[lane]->place][i] = h[i][lane];
}

/* ---- trees ---- */

typedef struct {
    uint32_t from, to; /* of the left chaining value, its right one follows; of theirs */
    uint32_t flags;
} join;

static void hash_joins(const join *joins, int count, uint32_t (*values)[WORDS]) {
    const uint8_t *block[LANES];
    lanes h[WORDS];
    block_state s = {{0}, {0}, (lanes){0} + BLOCK_BYTES, {0}};
    for (int lane = 0; lane < LANES; lane++) {
        const join *j = &joins[lane < count ? lane : count - 1];
        block[lane] = (const uint8_t *)values[j->from];
        s.flags[lane] = j->flags;
    }
    begin(h);
    compress(h, block, 0, &s);
    for (int i = 0; i < WORDS; i++)
        for (int lane = 0; lane < count; lane++)
            values[joins[lane].to][i] = h[i][lane];
}

/* Joins what each part has, `chunks` values from its start on, into one at its start. Pairing neighbours and carrying an odd last one
 * up gives BLAKE3's tree, whose left side is the largest power of two. `is_root`: that one is the hash of the whole input. */
static void join_parts(part *parts, int count, int is_root, uint32_t (*values)[WORDS]) {
    for (int more = 1; more;) {
        join joins[LANES];
        int waiting = 0;
        more = 0;
        for (int i = 0; i < count; i++)
            for (uint32_t j = 0; j < parts[i].chunks / 2; j++) {
                joins[waiting++] = (join){parts[i].start + 2 * j, parts[i].start + j,
                                          PARENT | (is_root && parts[i].chunks == 2 ? ROOT : 0u)};
                if (waiting == LANES) {
                    hash_joins(joins, waiting, values);
                    waiting = 0;
                }
            }
        if (waiting)
            hash_joins(joins, waiting, values);
        for (int i = 0; i < count; i++) {
            part *p = &parts[i];
            if (p->chunks > 1 && p->chunks % 2)
                memcpy(values[p->start + p->chunks / 2], values[p->start + p->chunks - 1], sizeof *values);
            p->chunks = (p->chunks + 1) / 2;
            more |= p->chunks > 1;
        }
    }
}

/* One chaining value per part, at its start; the parts have at most WAVE chunks together. */
static void hash_parts(part *parts, int count, int is_root, uint8_t prefix, uint32_t (*values)[WORDS]) {
    chunk chunks[WAVE];
    int places[NX_CHUNK_BYTES / BLOCK_BYTES + 1] = {0}, total = 0; /* by blocks: how many, then where the next one goes */
    for (int i = 0; i < count; i++) {
        places[NX_CHUNK_BYTES / BLOCK_BYTES] += (int)parts[i].chunks - 1;
        places[blocks_in(parts[i].leaf, parts[i].first + parts[i].chunks - 1)]++;
    }
    for (int blocks = NX_CHUNK_BYTES / BLOCK_BYTES; blocks > 0; blocks--) {
        const int many = places[blocks];
        places[blocks] = total;
        total += many;
    }
    for (int i = 0; i < count; i++) {
        const part *p = &parts[i];
        const unsigned alone = is_root && p->chunks == 1 ? ROOT : 0;
        for (uint32_t c = 0; c < p->chunks; c++) {
            const int blocks = blocks_in(p->leaf, p->first + c);
            chunks[places[blocks]++] = (chunk){p->leaf, p->first + c, p->start + c, (uint16_t)blocks, (uint16_t)(CHUNK_END | alone)};
        }
    }
    for (int i = 0; i < total; i += LANES)
        hash_chunks(chunks + i, total - i < LANES ? total - i : LANES, prefix, values);
    join_parts(parts, count, is_root, values);
}

/* Chunks [first, first + chunks) of a leaf, any number of them: a subtree, or, if `is_root`, all. */
static void hash_tree(const nx_leaf *leaf, uint64_t first, uint64_t chunks, int is_root, uint8_t prefix, uint32_t value[WORDS]) {
    if (chunks <= WAVE) {
        uint32_t values[WAVE][WORDS];
        part whole = {leaf, first, (uint32_t)chunks, 0};
        hash_parts(&whole, 1, is_root, prefix, values);
        memcpy(value, values[0], sizeof *values);
        return;
    }
    uint32_t pair[2][WORDS];
    uint64_t left = WAVE;
    while (2 * left < chunks)
        left *= 2;
    hash_tree(leaf, first, left, 0, prefix, pair[0]);
    hash_tree(leaf, first + left, chunks - left, 0, prefix, pair[1]);
    hash_joins(&(join){0, 0, PARENT | (is_root ? ROOT : 0u)}, 1, pair);
    memcpy(value, pair[0], sizeof *pair);
}

/* ---- entry ---- */

void JOIN(nx_hash_, NX_VARIANT)(const nx_leaf *leaves, int64_t count, uint8_t prefix) {
    uint32_t values[WAVE][WORDS];
    part parts[WAVE];
    for (int64_t i = 0; i < count;) {
        uint32_t chunks = 0;
        int many = 0;
        for (; i < count && chunks + chunks_of(leaves[i].bytes) <= WAVE; i++, many++) {
            parts[many] = (part){&leaves[i], 0, (uint32_t)chunks_of(leaves[i].bytes), chunks};
            chunks += parts[many].chunks;
        }
        if (many) {
            hash_parts(parts, many, 1, prefix, values);
            for (int p = 0; p < many; p++)
                memcpy(parts[p].leaf->hash, values[parts[p].start], NX_HASH_BYTES);
        } else {
            hash_tree(&leaves[i], 0, chunks_of(leaves[i].bytes), 1, prefix, values[0]);
            memcpy(leaves[i++].hash, values[0], NX_HASH_BYTES);
        }
    }
}

void JOIN(nx_hash_slice_, NX_VARIANT)(const nx_leaf *leaf, uint64_t slice, uint8_t *value) {
    uint32_t values[NX_SLICE_CHUNKS][WORDS];
    const uint64_t first = slice * NX_SLICE_CHUNKS, left = chunks_of(leaf->bytes) - first;
    part p = {leaf, first, left < NX_SLICE_CHUNKS ? (uint32_t)left : NX_SLICE_CHUNKS, 0};
    hash_parts(&p, 1, slices_of(leaf->bytes) == 1, NX_LEAF, values);
    memcpy(value, values[0], NX_HASH_BYTES);
}

void JOIN(nx_hash_join_, NX_VARIANT)(const nx_leaf *leaf, uint8_t *parts) {
    part p = {leaf, 0, (uint32_t)slices_of(leaf->bytes), 0};
    join_parts(&p, 1, 1, (uint32_t(*)[WORDS])parts);
    memcpy(leaf->hash, parts, NX_HASH_BYTES);
}
