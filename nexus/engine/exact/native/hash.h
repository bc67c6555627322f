/* BLAKE3 (github.com/BLAKE3-team/BLAKE3-specs) of many inputs at once, in the lanes of vectors: hash.c, compiled once per variant.
 *
 * An input is `prefix`, one byte, and then the data: 0 makes the leaf of a Merkle tree, 1 an inner node (nexus/core/hashing.py). */
#ifndef NEXUS_HASH_H
#define NEXUS_HASH_H

#include <stdint.h>

#define NX_HASH_BYTES 32
#define NX_LEAF       0
#define NX_NODE       1

typedef struct {
    const uint8_t *data;
    uint64_t bytes;
    uint8_t *hash; /* out: 32 bytes */
} nx_leaf;

#define NX_CHUNK_BYTES  1024
#define NX_SLICE_CHUNKS 64 /* of a slice; a power of two, so that every slice is a subtree */

static inline uint64_t chunks_of(uint64_t bytes) { return (bytes + 1 + NX_CHUNK_BYTES - 1) / NX_CHUNK_BYTES; }
static inline uint64_t slices_of(uint64_t bytes) { return (chunks_of(bytes) + NX_SLICE_CHUNKS - 1) / NX_SLICE_CHUNKS; }

/* For each variant:
 *   hash:   any number of inputs of any lengths
 *   slice:  slice number `slice` of a leaf that several threads hash together
 *   join:   its hash from what `slice` gave for all of its slices, one after the other in `parts`, which are lost */
#define NX_DECLARE_HASH(variant)                                                                                                   \
    void nx_hash_##variant(const nx_leaf *leaves, int64_t count, uint8_t prefix);                                                  \
    void nx_hash_slice_##variant(const nx_leaf *leaf, uint64_t slice, uint8_t *part);                                              \
    void nx_hash_join_##variant(const nx_leaf *leaf, uint8_t *parts);

#endif
