/* Matrices in tiles: making, unpacking, looking up rows. */
#include "packed.h"

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "parallel.h"
#include "scores.h"

size_t fp_packed_tiles(size_t rows, size_t cols)
{
    return fp_tiles_in(rows) * fp_tiles_in(cols);
}

size_t fp_packed_words(size_t rows, size_t cols)
{
    return rows * fp_tiles_in(cols);
}

size_t fp_packed_item_size(fp_dtype dtype)
{
    return dtype == FP_I8 ? 1 : fp_dtype_size(dtype);
}

fp_status fp_packed_valid(const fp_packed *p)
{
    if (!p || !p->offset || (fp_packed_words(p->rows, p->cols) && !p->mask))
        return FP_ERR_ARGUMENT;
    if (!fp_packed_item_size(p->dtype))
        return FP_ERR_DTYPE;
    return p->dtype == FP_I8 && p->rows && !p->scale ? FP_ERR_ARGUMENT : FP_OK;
}

size_t fp_packed_kept(const fp_packed *p)
{
    return (size_t)p->offset[fp_packed_tiles(p->rows, p->cols)];
}

const float *fp_packed_floats(const fp_kernels *kernels, const fp_packed *p, size_t offset,
                              size_t kept, float *buffer)
{
    const uint16_t *halves = (const uint16_t *)p->values + offset;
    const int8_t *bytes = (const int8_t *)p->values + offset;
    switch (p->dtype) {
    case FP_F16:
        kernels->half_to_float(halves, kept, buffer);
        return buffer;
    case FP_BF16:
        fp_bfloat_to_float(halves, kept, buffer);
        return buffer;
    case FP_I8:
        for (size_t i = 0; i < kept; i++)
            buffer[i] = bytes[i];
        return buffer;
    case FP_F32:
    case FP_F64:
        break;
    }
    return (const float *)p->values + offset;
}

/* ---- making -------------------------------------------------------------------------- */

/* Bits at .. at + n of a bit string, n <= 64. */
static uint64_t bits_at(const uint8_t *bits, size_t at, size_t n)
{
    uint64_t word = 0;
    size_t shift = at % 8, bytes = (shift + n + 7) / 8;
    memcpy(&word, bits + at / 8, bytes < 8 ? bytes : 8);
    word >>= shift;
    if (bytes > 8)
        word |= (uint64_t)bits[at / 8 + 8] << (64 - shift);
    return n < 64 ? word & ((UINT64_C(1) << n) - 1) : word;
}

typedef struct make_call {
    const fp_kernels *kernels;
    const fp_packed *p;
    const uint8_t *bits;
    uint64_t *mask, *offset;
    const char *w;
    char *values;
    size_t item_size;
    float *scale;
} make_call;

static void mask_row(void *context, size_t row, int worker)
{
    make_call *c = context;
    size_t cols = c->p->cols, across = fp_tiles_in(cols), rows = fp_tile_size(c->p->rows, row);
    (void)worker;
    for (size_t col = 0; col < across; col++)
        for (size_t i = 0; i < rows; i++)
            c->mask[row * FP_TILE * across + col * rows + i] = bits_at(
                c->bits, (row * FP_TILE + i) * cols + col * FP_TILE, fp_tile_size(cols, col));
}

fp_status fp_packed_mask(const uint8_t *bits, size_t rows, size_t cols, uint64_t *mask, int threads)
{
    if (fp_packed_words(rows, cols) && (!bits || !mask))
        return FP_ERR_ARGUMENT;
    fp_packed p = {.rows = rows, .cols = cols};
    make_call c = {.p = &p, .bits = bits, .mask = mask};
    fp_parallel_for(fp_tiles_in(rows), threads, mask_row, &c);
    return FP_OK;
}

/* offset[tile + 1] = values of the tile, or all ones where an unused bit is set. */
static void count_row(void *context, size_t row, int worker)
{
    make_call *c = context;
    size_t across = fp_tiles_in(c->p->cols), rows = fp_tile_size(c->p->rows, row);
    (void)worker;
    for (size_t col = 0; col < across; col++) {
        const uint64_t *mask = c->mask + row * FP_TILE * across + col * rows;
        size_t cols = fp_tile_size(c->p->cols, col);
        uint64_t unused = cols < 64 ? ~UINT64_C(0) << cols : 0, stray = 0, kept = 0;
        for (size_t i = 0; i < rows; i++) {
            stray |= mask[i] & unused;
            kept += (uint64_t)__builtin_popcountll(mask[i]);
        }
        c->offset[row * across + col + 1] = stray ? UINT64_MAX : kept;
    }
}

fp_status fp_packed_offsets(const uint64_t *mask, size_t rows, size_t cols, uint64_t *offset,
                            int threads)
{
    if (!offset || (fp_packed_words(rows, cols) && !mask))
        return FP_ERR_ARGUMENT;
    fp_packed p = {.rows = rows, .cols = cols};
    make_call c = {.p = &p, .mask = (uint64_t *)(uintptr_t)mask, .offset = offset};
    fp_parallel_for(fp_tiles_in(rows), threads, count_row, &c);
    offset[0] = 0;
    for (size_t i = 1; i <= fp_packed_tiles(rows, cols); i++) {
        if (offset[i] == UINT64_MAX)
            return FP_ERR_CORRUPT;
        offset[i] += offset[i - 1];
    }
    return FP_OK;
}

/* A row of a tile, by item size. Kernels take masks byte by byte, lowest bits first. */
static void pack_row(const fp_kernels *k, size_t item_size, const void *x, uint64_t mask, size_t n,
                     void *values, size_t room)
{
    uint8_t bits[8];
    for (int i = 0; i < 8; i++)
        bits[i] = (uint8_t)(mask >> 8 * i);
    if (item_size == 2)
        k->pack16(x, bits, n, values, room);
    else if (item_size == 4)
        k->pack32(x, bits, n, values, room);
    else
        k->pack64(x, bits, n, values, room);
}

void fp_packed_unpack_row(const fp_kernels *k, size_t item_size, const void *values,
                          size_t available, uint64_t mask, size_t n, void *x)
{
    uint8_t bits[8];
    for (int i = 0; i < 8; i++)
        bits[i] = (uint8_t)(mask >> 8 * i);
    if (item_size == 2)
        k->unpack16(values, available, bits, n, x);
    else if (item_size == 4)
        k->unpack32(values, available, bits, n, x);
    else
        k->unpack64(values, available, bits, n, x);
}

void fp_packed_pack_tile(const fp_kernels *k, size_t item_size, const fp_tile *tile, const void *x,
                         size_t stride, void *values, size_t end)
{
    const char *from = x;
    size_t offset = tile->offset;
    for (size_t i = 0; i < tile->rows; i++, from += stride * item_size) {
        pack_row(k, item_size, from, tile->mask[i], tile->cols, (char *)values + offset * item_size,
                 end - offset);
        offset += (size_t)__builtin_popcountll(tile->mask[i]);
    }
}

static void fill_row(void *context, size_t row, int worker)
{
    make_call *c = context;
    size_t cols = c->p->cols, size = c->item_size, across = fp_tiles_in(cols);
    size_t end = (size_t)c->p->offset[(row + 1) * across]; /* the next row is another task's */
    (void)worker;
    for (size_t col = 0; col < across; col++) {
        fp_tile tile = fp_packed_tile(c->p, row, col);
        const char *x = c->w + (row * FP_TILE * cols + col * FP_TILE) * size;
        fp_packed_pack_tile(c->kernels, size, &tile, x, cols, c->values, end);
    }
}

fp_status fp_packed_fill(const fp_kernels *kernels, const fp_packed *p, const void *w,
                         size_t item_size, void *values, int threads)
{
    if (!kernels || !p || !p->mask || !p->offset || !w || (fp_packed_kept(p) && !values))
        return FP_ERR_ARGUMENT;
    if (item_size != 2 && item_size != 4 && item_size != 8)
        return FP_ERR_DTYPE;
    make_call c = {.kernels = kernels, .p = p, .w = w, .values = values, .item_size = item_size};
    fp_parallel_for(fp_tiles_in(p->rows), threads, fill_row, &c);
    return FP_OK;
}

static void quantise_row(void *context, size_t row, int worker)
{
    make_call *c = context;
    size_t across = fp_tiles_in(c->p->cols), rows = fp_tile_size(c->p->rows, row);
    float *scale = c->scale + row * FP_TILE, inverse[FP_TILE];
    (void)worker;
    memset(scale, 0, rows * sizeof *scale);
    for (int pass = 0; pass < 2; pass++) {
        for (size_t col = 0; col < across; col++) {
            fp_tile tile = fp_packed_tile(c->p, row, col);
            const float *from = (const float *)c->p->values + tile.offset;
            int8_t *to = (int8_t *)c->values + tile.offset;
            for (size_t i = 0; i < rows; i++) {
                for (int left = __builtin_popcountll(tile.mask[i]); left; left--, from++, to++) {
                    if (pass)
                        *to = (int8_t)lrintf(*from * inverse[i]);
                    else if (fabsf(*from) > scale[i])
                        scale[i] = fabsf(*from);
                }
            }
        }
        for (size_t i = 0; i < rows && !pass; i++) {
            inverse[i] = scale[i] > 0 ? 127.0f / scale[i] : 0.0f;
            if (isinf(inverse[i])) /* a row of subnormals is nothing beside any other */
                inverse[i] = 0.0f;
            scale[i] /= 127.0f;
        }
    }
}

fp_status fp_packed_quantise(const fp_packed *p, int8_t *values, float *scale, int threads)
{
    fp_status status = fp_packed_valid(p);
    if (status)
        return status;
    if (p->dtype != FP_F32)
        return FP_ERR_DTYPE;
    if ((p->rows && !scale) || (fp_packed_kept(p) && (!p->values || !values)))
        return FP_ERR_ARGUMENT;
    make_call c = {.p = p, .values = (char *)values, .scale = scale};
    fp_parallel_for(fp_tiles_in(p->rows), threads, quantise_row, &c);
    return FP_OK;
}

/* ---- back ---------------------------------------------------------------------------- */

typedef struct dense_call {
    const fp_kernels *kernels;
    const fp_packed *p;
    const int64_t *ids;
    size_t n;
    int64_t ignored;
    char *w;
    const char *drows;
    char *dvalues;
} dense_call;

static size_t dense_item(fp_dtype dtype)
{
    return dtype == FP_I8 ? sizeof(float) : fp_dtype_size(dtype);
}

/* Row i of a tile, whose values begin at `offset`, at x. */
static void dense_row(const dense_call *c, const fp_tile *tile, size_t i, size_t offset,
                      float scale, void *x)
{
    const fp_packed *p = c->p;
    size_t size = dense_item(p->dtype);
    if (p->dtype != FP_I8) {
        fp_packed_unpack_row(c->kernels, size, (const char *)p->values + offset * size,
                             fp_packed_kept(p) - offset, tile->mask[i], tile->cols, x);
        return;
    }
    float values[FP_TILE];
    size_t kept = (size_t)__builtin_popcountll(tile->mask[i]);
    fp_packed_floats(c->kernels, p, offset, kept, values);
    for (size_t k = 0; k < kept; k++)
        values[k] *= scale;
    fp_packed_unpack_row(c->kernels, size, values, kept, tile->mask[i], tile->cols, x);
}

static void unpack_tiles(void *context, size_t row, int worker)
{
    dense_call *c = context;
    const fp_packed *p = c->p;
    size_t size = dense_item(p->dtype);
    (void)worker;
    for (size_t col = 0; col < fp_tiles_in(p->cols); col++) {
        fp_tile tile = fp_packed_tile(p, row, col);
        size_t offset = tile.offset;
        for (size_t i = 0; i < tile.rows; i++) {
            size_t r = row * FP_TILE + i;
            dense_row(c, &tile, i, offset, p->scale ? p->scale[r] : 1.0f,
                      c->w + (r * p->cols + col * FP_TILE) * size);
            offset += (size_t)__builtin_popcountll(tile.mask[i]);
        }
    }
}

fp_status fp_packed_unpack(const fp_kernels *kernels, const fp_packed *p, void *w, int threads)
{
    fp_status status = fp_packed_valid(p);
    if (status)
        return status;
    if (!kernels || (p->rows && p->cols && !w) || (fp_packed_kept(p) && !p->values))
        return FP_ERR_ARGUMENT;
    dense_call c = {.kernels = kernels, .p = p, .w = w};
    fp_parallel_for(fp_tiles_in(p->rows), threads, unpack_tiles, &c);
    return FP_OK;
}

/* Where the values of row i of a tile begin. */
static size_t row_offset(const fp_tile *tile, size_t i)
{
    size_t offset = tile->offset;
    for (size_t r = 0; r < i; r++)
        offset += (size_t)__builtin_popcountll(tile->mask[r]);
    return offset;
}

static void lookup_id(void *context, size_t item, int worker)
{
    dense_call *c = context;
    const fp_packed *p = c->p;
    size_t r = (size_t)c->ids[item], row = r / FP_TILE, i = r % FP_TILE;
    char *x = c->w + item * p->cols * dense_item(p->dtype);
    (void)worker;
    for (size_t col = 0; col < fp_tiles_in(p->cols); col++) {
        fp_tile tile = fp_packed_tile(p, row, col);
        dense_row(c, &tile, i, row_offset(&tile, i), p->scale ? p->scale[r] : 1.0f,
                  x + col * FP_TILE * dense_item(p->dtype));
    }
}

static fp_status ids_valid(const fp_packed *p, const int64_t *ids, size_t n)
{
    if (n && !ids)
        return FP_ERR_ARGUMENT;
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || (uint64_t)ids[i] >= p->rows)
            return FP_ERR_RANGE;
    return FP_OK;
}

fp_status fp_packed_lookup(const fp_kernels *kernels, const fp_packed *p, const int64_t *ids,
                           size_t n, void *rows, int threads)
{
    fp_status status = fp_packed_valid(p);
    if (!status)
        status = ids_valid(p, ids, n);
    if (status)
        return status;
    if (!kernels || (n && p->cols && !rows) || (fp_packed_kept(p) && !p->values))
        return FP_ERR_ARGUMENT;
    dense_call c = {.kernels = kernels, .p = p, .ids = ids, .w = rows};
    fp_parallel_for(n, threads, lookup_id, &c);
    return FP_OK;
}

/* All of a column of tiles: no two of them share a value, so the ids are added in their order. */
static void lookup_gradient(void *context, size_t col, int worker)
{
    dense_call *c = context;
    const fp_packed *p = c->p;
    size_t size = p->dtype == FP_F64 ? sizeof(double) : sizeof(float);
    (void)worker;
    for (size_t item = 0; item < c->n; item++) {
        if (c->ids[item] == c->ignored)
            continue;
        size_t r = (size_t)c->ids[item], i = r % FP_TILE;
        fp_tile tile = fp_packed_tile(p, r / FP_TILE, col);
        size_t kept = (size_t)__builtin_popcountll(tile.mask[i]), offset = row_offset(&tile, i);
        union {
            double f64[FP_TILE];
            float f32[FP_TILE];
        } picked;
        pack_row(c->kernels, size, c->drows + (item * p->cols + col * FP_TILE) * size, tile.mask[i],
                 tile.cols, &picked, FP_TILE);
        for (size_t k = 0; k < kept; k++) {
            if (p->dtype == FP_F64)
                ((double *)c->dvalues)[offset + k] += picked.f64[k];
            else
                ((float *)c->dvalues)[offset + k] += picked.f32[k];
        }
    }
}

fp_status fp_packed_lookup_gradient(const fp_kernels *kernels, const fp_packed *p,
                                    const int64_t *ids, size_t n, int64_t ignored,
                                    const void *drows, void *dvalues, int threads)
{
    fp_status status = fp_packed_valid(p);
    if (!status)
        status = ids_valid(p, ids, n);
    if (status)
        return status;
    if (!kernels || (n && p->cols && !drows) || (fp_packed_kept(p) && !dvalues))
        return FP_ERR_ARGUMENT;
    if (fp_packed_kept(p))
        memset(dvalues, 0,
               fp_packed_kept(p) * (p->dtype == FP_F64 ? sizeof(double) : sizeof(float)));
    dense_call c = {.kernels = kernels,
                    .p = p,
                    .ids = ids,
                    .n = n,
                    .ignored = ignored,
                    .drows = drows,
                    .dvalues = dvalues};
    fp_parallel_for(fp_tiles_in(p->cols), threads, lookup_gradient, &c);
    return FP_OK;
}
