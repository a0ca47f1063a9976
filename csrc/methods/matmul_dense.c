/* Products with matrices of which much is kept. */
#include "matmul_dense.h"

#include "lapack.h"
#include "packed.h"
#include "parallel.h"

/* A block's tiles: it stays in the second cache, and is large enough for BLAS. */
enum { DOWN = 8, ACROSS = 6, STRIDE = ACROSS * FP_TILE };
/* Tasks are the same for any number of threads, or sums would not be, and there are some even where
 * the matrix is small: an even number of blocks of results, and if these are fewer than TASKS, two
 * parts of the tokens, unless less than LEAST_TOKENS were in each. */
enum { TASKS = 4, LEAST_TOKENS = 128, MOST_TOKENS = 512 };

typedef struct buffer {
    float w[DOWN * FP_TILE * STRIDE], values[FP_TILE * FP_TILE];
} buffer;

typedef struct dense_call {
    const fp_kernels *kernels;
    const fp_packed *p;
    const float *bias, *x, *dy;
    float *y; /* what is computed: y, dx or dvalues */
    size_t tokens;
    buffer *buffers; /* one for every worker */
    fp_product product;
} dense_call;

/* Rows or columns of a block, or tokens. */
typedef struct span {
    size_t first, end; /* tiles */
    size_t begin, size;
} span;

/* All rows or columns: how many there are, in how many blocks of them. */
typedef struct side {
    size_t features, blocks;
} side;

/* What a product has them for: to add up over them in one task, or results of as many tasks. */
typedef enum role { SUMS, RESULTS } role;

static side side_of(size_t features, size_t most, role as)
{
    size_t tiles = fp_tiles_in(features), blocks = (tiles + most - 1) / most;
    if (as == RESULTS && blocks % 2 && blocks < tiles)
        blocks++;
    return (side){features, blocks};
}

static side rows_of(const fp_packed *p, role as)
{
    return side_of(p->rows, DOWN, as);
}

static side columns_of(const fp_packed *p, role as)
{
    return side_of(p->cols, ACROSS, as);
}

/* Into how many parts tokens go for so many blocks of results. */
static size_t parts_in(size_t tokens, size_t blocks)
{
    size_t parts = (tokens + MOST_TOKENS - 1) / MOST_TOKENS;
    return parts == 1 && blocks < TASKS && tokens >= 2 * LEAST_TOKENS ? 2 : parts;
}

/* The i-th block; they are alike. */
static span span_of(side of, size_t i)
{
    size_t tiles = fp_tiles_in(of.features);
    span s = {.first = i * tiles / of.blocks, .end = (i + 1) * tiles / of.blocks};
    s.begin = s.first * FP_TILE;
    s.size = (s.end * FP_TILE < of.features ? s.end * FP_TILE : of.features) - s.begin;
    return s;
}

/* The i-th part of so many tokens, likewise. */
static span tokens_of(size_t tokens, size_t parts, size_t i)
{
    size_t begin = i * tokens / parts;
    return (span){.begin = begin, .size = (i + 1) * tokens / parts - begin};
}

static float *place(buffer *b, span rows, span cols, size_t row, size_t col)
{
    return b->w + (row - rows.first) * FP_TILE * STRIDE + (col - cols.first) * FP_TILE;
}

static void unpack_tile(const dense_call *c, size_t row, size_t col, float *scratch, float *w)
{
    fp_tile tile = fp_packed_tile(c->p, row, col);
    const float *values = fp_packed_floats(c->kernels, c->p, tile.offset, tile.kept, scratch);
    const float *end = values + tile.kept;
    for (size_t i = 0; i < tile.rows; i++, w += STRIDE) {
        fp_packed_unpack_row(c->kernels, sizeof *w, values, (size_t)(end - values), tile.mask[i],
                             FP_TILE, w);
        values += __builtin_popcountll(tile.mask[i]);
        for (size_t j = 0; c->p->scale && j < FP_TILE; j++)
            w[j] *= c->p->scale[row * FP_TILE + i];
    }
}

static void unpack(const dense_call *c, span rows, span cols, buffer *b)
{
    for (size_t row = rows.first; row < rows.end; row++)
        for (size_t col = cols.first; col < cols.end; col++)
            unpack_tile(c, row, col, b->values, place(b, rows, cols, row, col));
}

/* The values of a block's gradient from the dense one. */
static void pack(const dense_call *c, span rows, span cols, buffer *b)
{
    size_t across = fp_tiles_in(c->p->cols);
    for (size_t row = rows.first; row < rows.end; row++) {
        size_t end = (size_t)c->p->offset[row * across + cols.end]; /* of this task's values */
        for (size_t col = cols.first; col < cols.end; col++) {
            fp_tile tile = fp_packed_tile(c->p, row, col);
            fp_packed_pack_tile(c->kernels, sizeof(float), &tile, place(b, rows, cols, row, col),
                                STRIDE, c->y, end);
        }
    }
}

/* c += op(a) op(b) or, with beta 0, c = it; column by column, as BLAS has them. */
static void multiply(const char *op_a, const char *op_b, size_t m, size_t n, size_t k,
                     const float *a, size_t lda, const float *b, size_t ldb, float beta, float *c,
                     size_t ldc)
{
    const float one = 1;
    const int32_t size[] = {(int32_t)m, (int32_t)n, (int32_t)k};
    const int32_t stride[] = {(int32_t)lda, (int32_t)ldb, (int32_t)ldc};
    fp_sgemm(op_a, op_b, &size[0], &size[1], &size[2], &one, a, &stride[0], b, &stride[1], &beta, c,
             &stride[2], 1, 1);
}

/* ---- tasks: results that add up in one order, however many threads there are ---------- */

/* Features of the result, which are rows of W forward and its columns backward, of some tokens. */
static void product_task(void *context, size_t item, int worker)
{
    const dense_call *c = context;
    const fp_packed *p = c->p;
    buffer *b = &c->buffers[worker];
    int forward = c->product == FP_FORWARD;
    side from = forward ? columns_of(p, SUMS) : rows_of(p, SUMS);
    side to = forward ? rows_of(p, RESULTS) : columns_of(p, RESULTS);
    size_t parts = parts_in(c->tokens, to.blocks);
    span results = span_of(to, item / parts), tokens = tokens_of(c->tokens, parts, item % parts);
    const float *x = (forward ? c->x : c->dy) + tokens.begin * from.features;
    float *y = c->y + tokens.begin * to.features + results.begin;
    for (size_t t = 0; t < tokens.size; t++)
        for (size_t i = 0; i < results.size; i++)
            y[t * to.features + i] = c->bias ? c->bias[results.begin + i] : 0;
    for (size_t j = 0; j < from.blocks; j++) {
        span sums = span_of(from, j);
        unpack(c, forward ? results : sums, forward ? sums : results, b);
        multiply(forward ? "T" : "N", "N", results.size, tokens.size, sums.size, b->w, STRIDE,
                 x + sums.begin, from.features, 1, y, to.features);
    }
}

static void run_products(dense_call *c, size_t blocks, int threads)
{
    fp_parallel_for(blocks * parts_in(c->tokens, blocks), threads, product_task, c);
}

/* A block of W. */
static void gradient_task(void *context, size_t item, int worker)
{
    const dense_call *c = context;
    const fp_packed *p = c->p;
    buffer *b = &c->buffers[worker];
    side down = rows_of(p, RESULTS), across = columns_of(p, RESULTS);
    span rows = span_of(down, item / across.blocks), cols = span_of(across, item % across.blocks);
    multiply("N", "T", cols.size, rows.size, c->tokens, c->x + cols.begin, p->cols,
             c->dy + rows.begin, p->rows, 0, b->w, STRIDE);
    pack(c, rows, cols, b);
}

/* ---- what callers see ------------------------------------------------------------------ */

int fp_dense_fits(const fp_packed *p, size_t tokens)
{
    return p->rows <= INT32_MAX && p->cols <= INT32_MAX && tokens <= INT32_MAX;
}

size_t fp_dense_work(int threads)
{
    return (size_t)fp_clamp_threads(threads) * sizeof(buffer);
}

void fp_dense_forward(const fp_kernels *kernels, const fp_packed *p, const float *x, size_t tokens,
                      const float *bias, float *y, int threads, void *work)
{
    dense_call c = {kernels, p, bias, x, NULL, y, tokens, work, FP_FORWARD};
    run_products(&c, rows_of(p, RESULTS).blocks, threads);
}

void fp_dense_backward(const fp_kernels *kernels, const fp_packed *p, const float *dy,
                       size_t tokens, float *dx, int threads, void *work)
{
    dense_call c = {kernels, p, NULL, NULL, dy, dx, tokens, work, FP_BACKWARD};
    run_products(&c, columns_of(p, RESULTS).blocks, threads);
}

void fp_dense_gradient(const fp_kernels *kernels, const fp_packed *p, const float *dy,
                       const float *x, size_t tokens, float *dvalues, int threads, void *work)
{
    dense_call c = {kernels, p, NULL, x, dy, dvalues, tokens, work, FP_GRADIENT};
    fp_parallel_for(rows_of(p, RESULTS).blocks * columns_of(p, RESULTS).blocks, threads,
                    gradient_task, &c);
}
