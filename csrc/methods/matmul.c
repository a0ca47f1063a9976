/* Products with packed matrices. */
#include "matmul.h"

#include <math.h>
#include <string.h>

#include "matmul_dense.h"
#include "packed.h"
#include "parallel.h"
#include "work.h"

enum {
    CHUNK = 384,    /* tokens, whose transposed activations stay in the last cache */
    LEAST_OWN = 80, /* tokens of a tile for which a thread works alone, on average */
    GROUP = 16      /* tiles of results that stay in the second cache while a tile of x is met */
};

/* Tokens go in tiles as wide as registers allow, and alike: a narrow last one would cost the same
 * as a wider one. */
typedef struct token_tile {
    size_t first, count, width; /* count tokens, and zeros up to the width */
} token_tile;

static token_tile token_tile_of(size_t tokens, size_t tiles, size_t i)
{
    size_t steps = (tokens + FP_WIDTH_STEP - 1) / FP_WIDTH_STEP, each = steps / tiles;
    size_t wider = steps % tiles, before = i * each + (i < wider ? i : wider);
    token_tile t = {.first = before * FP_WIDTH_STEP, .width = (each + (i < wider)) * FP_WIDTH_STEP};
    t.count = tokens - t.first < t.width ? tokens - t.first : t.width;
    return t;
}

/* In how many tiles, at most so wide, tokens go if every thread has as many of its own, or 0: these
 * would be too narrow. */
static size_t own_tiles(size_t tokens, size_t width, int threads)
{
    size_t workers = (size_t)fp_clamp_threads(threads);
    size_t least = (tokens + width - 1) / width;
    size_t tiles = (least + workers - 1) / workers * workers;
    return tiles * LEAST_OWN <= tokens ? tiles : 0;
}

/* ---- what is read next ----------------------------------------------------------------
 *
 * Tiles lie where no hardware prefetcher expects them. While one is worked on, what the next one
 * needs is asked for, into the second cache. */

enum { LINE = 64 }; /* bytes; another size of lines costs time alone */

static void prefetch(const void *from, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += LINE)
        __builtin_prefetch((const char *)from + at, 0, 2);
}

/* The i-th of n parts. */
static void prefetch_part(const void *from, size_t bytes, size_t i, size_t n)
{
    size_t begin = bytes * i / n / LINE * LINE;
    prefetch((const char *)from + begin, bytes * (i + 1) / n - begin);
}

/* A tile's mask and values, if there is such a row of tiles. */
static void prefetch_tile(const fp_packed *p, size_t row, size_t col)
{
    if (row >= fp_tiles_in(p->rows))
        return;
    fp_tile tile = fp_packed_tile(p, row, col);
    size_t item = fp_packed_item_size(p->dtype);
    prefetch(tile.mask, tile.rows * sizeof *tile.mask);
    prefetch((const char *)p->values + tile.offset * item, tile.kept * item);
}

/* ---- by tiles, for both types -------------------------------------------------------- */

static const float *values_f32(const fp_kernels *k, const fp_packed *p, size_t offset, size_t kept,
                               float *buffer)
{
    return fp_packed_floats(k, p, offset, kept, buffer);
}

#define transpose_f32(k, ...) (k)->matmul->transpose(__VA_ARGS__)
#define forward_f32(k, ...) (k)->matmul->forward(__VA_ARGS__)
#define backward_f32(k, ...) (k)->matmul->backward(__VA_ARGS__)
#define gradient_f32(k, ...) (k)->matmul->gradient(__VA_ARGS__)
#define REAL float
#define NAME(x) x##_f32
#include "matmul_real.h"
#undef REAL
#undef NAME

static const double *values_f64(const fp_kernels *k, const fp_packed *p, size_t offset, size_t kept,
                                double *buffer)
{
    (void)k;
    (void)kept;
    (void)buffer;
    return (const double *)p->values + offset;
}

#define transpose_f64(k, ...) fp_transpose_f64_scalar(__VA_ARGS__)
#define forward_f64(k, ...) fp_forward_f64_scalar(__VA_ARGS__)
#define backward_f64(k, ...) fp_backward_f64_scalar(__VA_ARGS__)
#define gradient_f64(k, ...) fp_gradient_f64_scalar(__VA_ARGS__)
#define REAL double
#define NAME(x) x##_f64
#include "matmul_real.h"
#undef REAL
#undef NAME

/* ---- few tokens ---------------------------------------------------------------------- */

enum { TAIL = FP_TILE * FP_TILE + 2 * FP_VALUES_SLACK }; /* values */

typedef struct vector_call {
    const fp_kernels *kernels;
    const fp_packed *p;
    const float *bias, *x;
    float *y;
    size_t tokens;
    float *padded;           /* x with zeros to whole tiles */
    uint32_t (*tails)[TAIL]; /* one for every worker */
} vector_call;

typedef void(*vector_kernel) FP_VECTOR_SIGNATURE;

static vector_kernel vector_of(const fp_kernels *kernels, fp_dtype dtype)
{
    const fp_matmul_kernels *k = kernels->matmul;
    return dtype == FP_F32    ? k->vector_f32
           : dtype == FP_F16  ? k->vector_f16
           : dtype == FP_BF16 ? k->vector_bf16
                              : k->vector_i8;
}

/* Kernels may read past their values, so a row's tiles at the very end of the array are taken from
 * a copy. Returns how many tiles come before. */
static size_t tiles_before_end(const fp_packed *p, size_t row)
{
    size_t across = fp_tiles_in(p->cols), tiles = across;
    uint64_t total = fp_packed_kept(p);
    while (tiles && p->offset[row * across + tiles] + FP_VALUES_SLACK > total)
        tiles--;
    return tiles;
}

static void vector_task(void *context, size_t row, int worker)
{
    vector_call *c = context;
    const fp_packed *p = c->p;
    size_t across = fp_tiles_in(p->cols), stride = across * FP_TILE;
    size_t item = fp_packed_item_size(p->dtype), whole = tiles_before_end(p, row);
    const char *values = p->values;
    fp_tile first = fp_packed_tile(p, row, 0);
    size_t tail = (size_t)p->offset[row * across + whole];
    if (whole < across) {
        size_t kept = (size_t)p->offset[(row + 1) * across] - tail;
        memset(c->tails[worker], 0, sizeof c->tails[worker]);
        if (kept)
            memcpy(c->tails[worker], values + tail * item, kept * item);
    }
    vector_kernel vector = vector_of(c->kernels, p->dtype);
    for (size_t token = 0; token < c->tokens; token += FP_VECTOR_TOKENS) {
        size_t count = c->tokens - token < FP_VECTOR_TOKENS ? c->tokens - token : FP_VECTOR_TOKENS;
        const float *x = c->padded + token * stride;
        float y[FP_VECTOR_TOKENS * FP_TILE], rest[FP_VECTOR_TOKENS * FP_TILE] = {0};
        vector(first.mask, whole, first.rows, values + first.offset * item, x, stride, count, y);
        if (whole < across)
            vector(first.mask + whole * first.rows, across - whole, first.rows, c->tails[worker],
                   x + whole * FP_TILE, stride, count, rest);
        for (size_t t = 0; t < count; t++)
            for (size_t i = 0; i < first.rows; i++) {
                size_t r = row * FP_TILE + i, at = t * FP_TILE + i;
                float sum = (y[at] + rest[at]) * (p->scale ? p->scale[r] : 1.0f);
                c->y[(token + t) * p->rows + r] = sum + (c->bias ? c->bias[r] : 0.0f);
            }
    }
}

static size_t vector_plan(vector_call *c, int threads, char *base)
{
    size_t used = 0, stride = fp_tiles_in(c->p->cols) * FP_TILE;
    c->padded = fp_take(base, &used, c->tokens * stride, sizeof(float));
    c->tails = fp_take(base, &used, (size_t)fp_clamp_threads(threads), sizeof *c->tails);
    return used;
}

static void run_vector(vector_call *c, int threads, void *work)
{
    size_t cols = c->p->cols, stride = fp_tiles_in(cols) * FP_TILE;
    vector_plan(c, threads, work);
    for (size_t t = 0; t < c->tokens; t++) {
        memcpy(c->padded + t * stride, c->x + t * cols, cols * sizeof(float));
        memset(c->padded + t * stride + cols, 0, (stride - cols) * sizeof(float));
    }
    fp_parallel_for(fp_tiles_in(c->p->rows), threads, vector_task, c);
}

/* ---- what callers see ---------------------------------------------------------------- */

/* Times for a weight of the dense matrix, kept or not, by tests/bench/bench_matmul.py with AVX2;
 * only their ratios count. A pass of `vector` costs the same whatever is kept; a tile of `sparse` a
 * little and then by what is kept, nearly alike for 16 and for 32 tokens. */
static const double VECTOR_COST[FP_VECTOR_TOKENS + 1] = {0, 0.103, 0.117, 0.136, 0.159};
static const double SPARSE_COST = 0.12, SPARSE_COST_KEPT = 0.91;
static const double EXPANDED_COST[] = {0.42, 0.73}; /* for 16 and 32 tokens, whatever is kept */
enum { MOST_VECTOR_TOKENS = 24, LEAST_DENSE_TOKENS = 96 };
/* From where on BLAS is faster, by fp_product. */
static const double LEAST_DENSE_DENSITY[] = {0.88, 0.69, 0.69};

fp_matmul_method fp_matmul_choice(const fp_kernels *kernels, const fp_packed *p, fp_product product,
                                  size_t tokens)
{
    double elements = (double)p->rows * (double)p->cols;
    double density = (double)fp_packed_kept(p) / fmax(elements, 1);
    if (p->dtype == FP_F64)
        return FP_MATMUL_SPARSE;
    double vector = VECTOR_COST[FP_VECTOR_TOKENS] * (double)(tokens / FP_VECTOR_TOKENS) +
                    VECTOR_COST[tokens % FP_VECTOR_TOKENS];
    double sparse = SPARSE_COST + SPARSE_COST_KEPT * density;
    if (kernels->matmul->expands)
        sparse = fmin(sparse, EXPANDED_COST[tokens > FP_WIDTH_STEP]);
    if (product == FP_FORWARD && tokens <= MOST_VECTOR_TOKENS && vector < sparse)
        return FP_MATMUL_VECTOR;
    int much = density > LEAST_DENSE_DENSITY[product];
    if (product == FP_FORWARD && density == 1)
        much = 0; /* its kernels know whole rows */
    return much && tokens >= LEAST_DENSE_TOKENS && fp_dense_fits(p, tokens) ? FP_MATMUL_DENSE
                                                                            : FP_MATMUL_SPARSE;
}

size_t fp_matmul_work(const fp_packed *p, size_t tokens, int threads)
{
    vector_call vector = {.p = p, .tokens = tokens < CHUNK ? tokens : CHUNK};
    call_f32 single = {.p = p};
    call_f64 twice = {.p = p};
    size_t bytes = p->dtype == FP_F64 ? plan_f64(&twice, tokens, threads, NULL)
                                      : plan_f32(&single, tokens, threads, NULL);
    size_t others[] = {vector_plan(&vector, threads, NULL), fp_dense_work(threads)};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        bytes = others[i] > bytes ? others[i] : bytes;
    return bytes;
}

static fp_status check(const fp_kernels *kernels, const fp_packed *p, const void *x,
                       size_t x_features, const void *y, size_t y_features, size_t tokens,
                       int threads, const void *work, size_t work_bytes)
{
    fp_status status = fp_packed_valid(p);
    if (status)
        return status;
    if (!kernels || (tokens && ((x_features && !x) || (y_features && !y))) ||
        (fp_packed_kept(p) && !p->values))
        return FP_ERR_ARGUMENT;
    return !work || work_bytes < fp_matmul_work(p, tokens, threads) ? FP_ERR_ARGUMENT : FP_OK;
}

/* FP_OK and what *method is now. */
static fp_status settle(const fp_kernels *kernels, const fp_packed *p, fp_product product,
                        size_t tokens, fp_matmul_method *method)
{
    if (*method == FP_MATMUL_AUTO)
        *method = fp_matmul_choice(kernels, p, product, tokens);
    if (*method == FP_MATMUL_VECTOR && product != FP_FORWARD)
        return FP_ERR_ARGUMENT;
    return *method == FP_MATMUL_DENSE && !fp_dense_fits(p, tokens) ? FP_ERR_OVERFLOW : FP_OK;
}

fp_status fp_matmul_forward(const fp_kernels *kernels, const fp_packed *p, const void *x,
                            size_t tokens, const void *bias, void *y, fp_matmul_method method,
                            int threads, void *work, size_t work_bytes)
{
    fp_status status = check(kernels, p, x, p ? p->cols : 0, y, p ? p->rows : 0, tokens, threads,
                             work, work_bytes);
    if (status || (status = settle(kernels, p, FP_FORWARD, tokens, &method)))
        return status;
    if (p->dtype == FP_F64) {
        call_f64 c = {.kernels = kernels, .p = p, .bias = bias, .y = y};
        run_f64(c, FP_FORWARD, x, NULL, tokens, threads, work);
    } else if (method == FP_MATMUL_SPARSE) {
        call_f32 c = {.kernels = kernels, .p = p, .bias = bias, .y = y};
        run_f32(c, FP_FORWARD, x, NULL, tokens, threads, work);
    } else if (method == FP_MATMUL_DENSE) {
        fp_dense_forward(kernels, p, x, tokens, bias, y, threads, work);
    } else {
        for (size_t begin = 0; begin < tokens; begin += CHUNK) {
            vector_call c = {.kernels = kernels,
                             .p = p,
                             .bias = bias,
                             .x = (const float *)x + begin * p->cols,
                             .y = (float *)y + begin * p->rows,
                             .tokens = tokens - begin < CHUNK ? tokens - begin : CHUNK};
            run_vector(&c, threads, work);
        }
    }
    return FP_OK;
}

fp_status fp_matmul_backward(const fp_kernels *kernels, const fp_packed *p, const void *dy,
                             size_t tokens, void *dx, fp_matmul_method method, int threads,
                             void *work, size_t work_bytes)
{
    fp_status status = check(kernels, p, dy, p ? p->rows : 0, dx, p ? p->cols : 0, tokens, threads,
                             work, work_bytes);
    if (status || (status = settle(kernels, p, FP_BACKWARD, tokens, &method)))
        return status;
    if (p->dtype == FP_F64) {
        call_f64 c = {.kernels = kernels, .p = p, .y = dx};
        run_f64(c, FP_BACKWARD, NULL, dy, tokens, threads, work);
    } else if (method == FP_MATMUL_DENSE) {
        fp_dense_backward(kernels, p, dy, tokens, dx, threads, work);
    } else {
        call_f32 c = {.kernels = kernels, .p = p, .y = dx};
        run_f32(c, FP_BACKWARD, NULL, dy, tokens, threads, work);
    }
    return FP_OK;
}

fp_status fp_matmul_gradient(const fp_kernels *kernels, const fp_packed *p, const void *dy,
                             const void *x, size_t tokens, void *dvalues, fp_matmul_method method,
                             int threads, void *work, size_t work_bytes)
{
    fp_status status = fp_packed_valid(p);
    if (status)
        return status;
    if (p->dtype == FP_I8)
        return FP_ERR_DTYPE;
    size_t kept = fp_packed_kept(p);
    if (!kernels || (tokens && ((p->rows && !dy) || (p->cols && !x))) || (kept && !dvalues) ||
        !work || work_bytes < fp_matmul_work(p, tokens, threads))
        return FP_ERR_ARGUMENT;
    if (!kept || (status = settle(kernels, p, FP_GRADIENT, tokens, &method)))
        return status;
    if (p->dtype != FP_F64 && method == FP_MATMUL_DENSE) {
        fp_dense_gradient(kernels, p, dy, x, tokens, dvalues, threads, work);
        return FP_OK;
    }
    memset(dvalues, 0, kept * (p->dtype == FP_F64 ? sizeof(double) : sizeof(float)));
    if (p->dtype == FP_F64) {
        call_f64 c = {.kernels = kernels, .p = p, .y = dvalues};
        run_f64(c, FP_GRADIENT, x, dy, tokens, threads, work);
    } else {
        call_f32 c = {.kernels = kernels, .p = p, .y = dvalues};
        run_f32(c, FP_GRADIENT, x, dy, tokens, threads, work);
    }
    return FP_OK;
}
