/* Where things are in a packed matrix. */
#ifndef FOLDPRUNE_PACKED_H
#define FOLDPRUNE_PACKED_H

#include "foldprune.h"

static inline size_t fp_tiles_in(size_t n)
{
    return n / FP_TILE + (n % FP_TILE != 0);
}

/* How many of n rows or columns are in the tile. */
static inline size_t fp_tile_size(size_t n, size_t tile)
{
    return n - tile * FP_TILE < FP_TILE ? n - tile * FP_TILE : FP_TILE;
}

typedef struct fp_tile {
    const uint64_t *mask; /* of its rows */
    size_t rows, cols;
    size_t offset, kept; /* of its values */
} fp_tile;

static inline fp_tile fp_packed_tile(const fp_packed *p, size_t row, size_t col)
{
    size_t across = fp_tiles_in(p->cols), rows = fp_tile_size(p->rows, row);
    const uint64_t *offset = p->offset + row * across + col;
    return (fp_tile){.mask = p->mask + row * FP_TILE * across + col * rows,
                     .rows = rows,
                     .cols = fp_tile_size(p->cols, col),
                     .offset = (size_t)offset[0],
                     .kept = (size_t)(offset[1] - offset[0])};
}

/* FP_OK if pointers and type are there. */
fp_status fp_packed_valid(const fp_packed *p);

size_t fp_packed_item_size(fp_dtype dtype); /* FP_I8 included */

/* kept values from `offset` on as float, scales not applied; of FP_F32 where they are, else in
 * `buffer`. */
const float *fp_packed_floats(const fp_kernels *kernels, const fp_packed *p, size_t offset,
                              size_t kept, float *buffer);

/* n elements of item_size bytes from the values of one row of a tile. `available` values can be
 * read, at least those of the row: where there are more, nothing has to be done one by one. */
void fp_packed_unpack_row(const fp_kernels *kernels, size_t item_size, const void *values,
                          size_t available, uint64_t mask, size_t n, void *x);

/* The other way, for a tile of elements whose rows are `stride` apart. Of the matrix' values those
 * from the tile's own on, and up to `end`, may change: where that is further than these, nothing
 * has to be done one by one. */
void fp_packed_pack_tile(const fp_kernels *kernels, size_t item_size, const fp_tile *tile,
                         const void *x, size_t stride, void *values, size_t end);

#endif
