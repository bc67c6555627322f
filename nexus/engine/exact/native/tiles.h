/* The same dot products with AMX tiles, for many rows: a tile is 16 rows of 64 bytes, one instruction multiplies 16 x 64 by 64
 * x 16.
 *
 * Activations lie in tiles too ([row / 16][k / 64][16][64]), so that a tile is 1 KiB in one piece: with rows K bytes apart its 16
 * lines would fall into the same few sets of the cache. */
#ifndef NEXUS_TILES_H
#define NEXUS_TILES_H

#include "dot.h"

#define TILE_ROWS  16
#define TILE_BYTES 1024

/* Tiles of each group that are asked for in advance: what memory delivers in its own latency. Many more push each other out of the
 * cache. */
#define AHEAD_TILES 8

#ifdef __AMX_INT8__

/* From so many rows on tiles are faster than vectors. */
#define TILES_FROM 9

typedef struct {
    uint8_t palette, start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* Eight tiles of 16 x 64 bytes. GCC 12 tells its optimiser that ldtilecfg reads 8 bytes and drops the stores of the others: hence
 * volatile. */
static inline void begin_tiles(void) {
    volatile tile_config config;
    for (size_t i = 0; i < sizeof config; i++)
        ((volatile uint8_t *)&config)[i] = 0;
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.rows[i] = TILE_ROWS;
        config.row_bytes[i] = 64;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
}

static inline void end_tiles(void) { _tile_release(); }

/* The two tiles of weights that come AHEAD_TILES later: the next block of columns follows the second group of this one. */
ALWAYS_INLINE void fetch_tiles(const uint8_t *w, size_t second, int k, int blocks) {
    const int ahead = blocks < AHEAD_TILES ? blocks : AHEAD_TILES;
    const uint8_t *from = w + (size_t)ahead * TILE_BYTES + (k + ahead < blocks ? 0 : second);
    fetch_lines(from, TILE_BYTES / 64);
    fetch_lines(from + second, TILE_BYTES / 64);
}

/* acc[r][c] = the dot products of `tile_rows` (1 or 2) tiles of rows, which are `x_tiles` bytes apart. `is_ahead`: these weights
 * come from memory, so later ones are asked for; only the first rows of a batch have to. */
static inline void dot_tiles(const int8_t *x, size_t x_tiles, int tile_rows, const uint8_t *w, size_t second, int blocks,
                             int is_ahead, int32_t *acc) {
    const size_t acc_row = NX_BLOCK * sizeof(int32_t);
    __asm__ volatile("" : : : "memory"); /* the loads below do not tell the compiler what they read */
    _tile_zero(0);
    _tile_zero(1);
    if (tile_rows == 1) {
        for (int k = 0; k < blocks; k++, x += TILE_BYTES, w += TILE_BYTES) {
            if (is_ahead)
                fetch_tiles(w, second, k, blocks);
            _tile_loadd(4, x, 64);
            _tile_loadd(6, w, 64);
            _tile_loadd(7, w + second, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
        }
    } else {
        _tile_zero(2);
        _tile_zero(3);
        for (int k = 0; k < blocks; k++, x += TILE_BYTES, w += TILE_BYTES) {
            if (is_ahead)
                fetch_tiles(w, second, k, blocks);
            _tile_loadd(4, x, 64);
            _tile_loadd(6, w, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(7, w + second, 64);
            _tile_dpbsud(1, 4, 7);
            _tile_loadd(5, x + x_tiles, 64);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(2, acc + 16 * NX_BLOCK, acc_row);
        _tile_stored(3, acc + 16 * NX_BLOCK + 16, acc_row);
    }
    _tile_stored(0, acc, acc_row);
    _tile_stored(1, acc + 16, acc_row);
    __asm__ volatile("" : : : "memory");
}

#else

#define TILES_FROM INT32_MAX

static inline void begin_tiles(void) {}
static inline void end_tiles(void) {}
static inline void dot_tiles(const int8_t *x, size_t x_tiles, int tile_rows, const uint8_t *w, size_t second, int blocks,
                             size_t ahead, int32_t *acc) {
    (void)ahead, (void)x, (void)x_tiles, (void)tile_rows, (void)w, (void)second, (void)blocks, (void)acc;
}

#endif
#endif
