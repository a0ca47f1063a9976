/* Forward propagation pruning: exact least squares of the kept weights, and what a change costs. */
#include <math.h>
#include <string.h>

#include "cholesky.h"
#include "lapack.h"
#include "matrix.h"
#include "parallel.h"

enum { TILE = 96 }; /* rows, a multiple of 8 */
static const double ONE = 1.0, TWO = 2.0, ZERO = 0.0;

static int kept(const uint8_t *mask, size_t bit)
{
    return mask[bit >> 3] >> (bit & 7) & 1;
}

static void *take(char *base, size_t *used, size_t items, size_t size)
{
    void *piece = base ? base + *used : NULL;
    *used += (items * size + 63) / 64 * 64;
    return piece;
}

/* ---- least squares ---- */

/* One worker's buffers. */
typedef struct refit_buffers {
    double *given;   /* TILE x cols: rows of rhs, or without one of w */
    double *product; /* given times the inverse of H, or without rhs times H */
    double *system;  /* of the kept or of the removed columns, whichever are fewer */
    double *rhs;     /* the same rows of up to TILE right-hand sides */
    double *scratch; /* cols */
    int32_t *index;  /* the columns of the system, in ascending order */
} refit_buffers;

typedef struct refit_call {
    const fp_matrix *w;
    const uint8_t *mask;
    const double *h, *rhs;
    void *out;
    fp_dtype out_dtype;
    size_t rows, cols;
    size_t largest;  /* order of a system */
    int any_kept;    /* some row solves for what it keeps */
    int any_removed; /* some row solves for what it removes: needs the inverse of H */
    double *inverse; /* cols x cols */
    double *factor;
    char *buffers;
    size_t stride;
    fp_status *status; /* per tile */
} refit_call;

/* A row keeps k of its columns: is the system that of the removed ones? */
static int by_removed(const refit_call *c, size_t k)
{
    return k > c->cols / 2;
}

static size_t count_row(const uint8_t *mask, size_t row, size_t cols)
{
    size_t k = 0, bit = row * cols, end = bit + cols;
    while (bit < end && bit & 7)
        k += (size_t)kept(mask, bit++);
    for (; bit + 8 <= end; bit += 8)
        k += (size_t)__builtin_popcount(mask[bit >> 3]);
    while (bit < end)
        k += (size_t)kept(mask, bit++);
    return k;
}

/* Counts what the rows keep. */
static void plan(refit_call *c)
{
    for (size_t i = 0; i < c->rows; i++) {
        size_t k = count_row(c->mask, i, c->cols), removed = c->cols - k;
        size_t order = by_removed(c, k) ? removed : k;
        c->largest = order > c->largest ? order : c->largest;
        c->any_kept |= k && !by_removed(c, k);
        c->any_removed |= by_removed(c, k) && (removed || c->rhs);
    }
}

static refit_buffers lay_out_worker(const refit_call *c, char *base, size_t *bytes)
{
    refit_buffers b;
    size_t used = 0;
    b.given = take(base, &used, TILE * c->cols, sizeof(double));
    b.product = take(base, &used, TILE * c->cols, sizeof(double));
    b.system = take(base, &used, c->largest * c->largest, sizeof(double));
    b.rhs = take(base, &used, c->largest * TILE, sizeof(double));
    b.scratch = take(base, &used, c->cols, sizeof(double));
    b.index = take(base, &used, c->largest, sizeof(int32_t));
    *bytes = used;
    return b;
}

static size_t lay_out(refit_call *c, char *base, int threads)
{
    size_t used = 0, square = c->any_removed ? c->cols * c->cols : 0;
    c->inverse = take(base, &used, square, sizeof(double));
    c->factor = take(base, &used, square, sizeof(double));
    c->status = take(base, &used, (c->rows + TILE - 1) / TILE, sizeof(fp_status));
    lay_out_worker(c, NULL, &c->stride);
    c->buffers = base ? base + used : NULL;
    return used + (size_t)fp_clamp_threads(threads) * c->stride;
}

static int same_support(const refit_call *c, size_t row, size_t other)
{
    size_t a = row * c->cols, b = other * c->cols;
    if (!(c->cols & 7))
        return !memcmp(c->mask + a / 8, c->mask + b / 8, c->cols / 8);
    for (size_t j = 0; j < c->cols; j++)
        if (kept(c->mask, a + j) != kept(c->mask, b + j))
            return 0;
    return 1;
}

/* Factors the system of b->index out of `matrix` (H or its inverse). */
static fp_status factor_system(const refit_call *c, const double *matrix, int32_t order,
                               refit_buffers *b)
{
    for (int32_t j = 0; j < order; j++) {
        const double *source = matrix + (size_t)b->index[j] * c->cols;
        double *column = b->system + (size_t)j * (size_t)order;
        for (int32_t i = j; i < order; i++)
            column[i] = source[b->index[i]];
    }
    int32_t info;
    fp_dpotrf("L", &order, b->system, &order, &info, 1);
    for (int32_t i = 0; !info && i < order; i++) /* a NaN may pass dpotrf by */
        info = !(b->system[(size_t)i * ((size_t)order + 1)] > 0);
    return info ? FP_ERR_LAPACK : FP_OK;
}

static void write_row(const refit_call *c, size_t row, const double *x)
{
    if (c->out_dtype == FP_F64) {
        memcpy((double *)c->out + row * c->cols, x, c->cols * sizeof *x);
        return;
    }
    float *target = (float *)c->out + row * c->cols;
    for (size_t j = 0; j < c->cols; j++)
        target[j] = (float)x[j];
}

/* Rows [first, first + count) of one support. `rows`: right-hand sides or, for a system of removed
 * columns, unconstrained solutions. */
static fp_status solve_run(const refit_call *c, size_t first, size_t count, int removed,
                           const double *rows, refit_buffers *b)
{
    int32_t order = 0, runs = (int32_t)count, info;
    for (size_t j = 0; j < c->cols; j++)
        if (kept(c->mask, first * c->cols + j) != removed)
            b->index[order++] = (int32_t)j;
    fp_status status = order ? factor_system(c, removed ? c->inverse : c->h, order, b) : FP_OK;
    if (status)
        return status;
    for (size_t i = 0; i < count; i++)
        for (int32_t j = 0; j < order; j++)
            b->rhs[i * (size_t)order + (size_t)j] = rows[i * c->cols + (size_t)b->index[j]];
    if (order)
        fp_dpotrs("L", &order, &runs, b->system, &order, b->rhs, &order, &info, 1);
    for (size_t i = 0; i < count; i++) {
        const double *solution = b->rhs + i * (size_t)order;
        if (!removed) {
            memset(b->scratch, 0, c->cols * sizeof *b->scratch);
            for (int32_t j = 0; j < order; j++)
                b->scratch[b->index[j]] = solution[j];
        } else {
            /* of all x + y Hinv the cheapest that is zero in the removed columns */
            memcpy(b->scratch, rows + i * c->cols, c->cols * sizeof *b->scratch);
            for (int32_t j = 0; j < order; j++) {
                const double *direction = c->inverse + (size_t)b->index[j] * c->cols;
                for (size_t l = 0; l < c->cols; l++)
                    b->scratch[l] -= solution[j] * direction[l];
            }
            for (int32_t j = 0; j < order; j++)
                b->scratch[b->index[j]] = 0.0;
        }
        write_row(c, first + i, b->scratch);
    }
    return FP_OK;
}

static void refit_tile(void *context, size_t tile, int worker)
{
    refit_call *c = context;
    size_t bytes, first = tile * TILE, rows = c->rows - first < TILE ? c->rows - first : TILE;
    refit_buffers b = lay_out_worker(c, c->buffers + (size_t)worker * c->stride, &bytes);
    int multiplied = 0;
    c->status[tile] = FP_OK;
    if (c->rhs)
        memcpy(b.given, c->rhs + first * c->cols, rows * c->cols * sizeof *b.given);
    else
        fp_matrix_load(c->w, first, rows, b.given, c->cols, 1);
    for (size_t i = 0, count; i < rows && !c->status[tile]; i += count) {
        size_t k = count_row(c->mask, first + i, c->cols);
        int removed = by_removed(c, k);
        count = 1;
        while (i + count < rows && same_support(c, first + i, first + i + count))
            count++;
        int direct = (c->rhs != NULL) != removed;
        if (!direct && !multiplied && k) {
            int32_t n = (int32_t)c->cols, m = (int32_t)rows;
            fp_dgemm("N", "N", &n, &m, &n, &ONE, c->rhs ? c->inverse : c->h, &n, b.given, &n, &ZERO,
                     b.product, &n, 1, 1);
            multiplied = 1;
        }
        c->status[tile] = solve_run(c, first + i, count, removed,
                                    (direct ? b.given : b.product) + i * c->cols, &b);
    }
}

size_t fp_refit_work(const uint8_t *mask, const double *rhs, size_t rows, size_t cols, int threads)
{
    refit_call c = {.mask = mask, .rhs = rhs, .rows = rows, .cols = cols};
    plan(&c);
    return lay_out(&c, NULL, threads);
}

fp_status fp_refit(const fp_matrix *w, const uint8_t *mask, const double *h, const double *rhs,
                   void *out, fp_dtype out_dtype, int threads, void *work, size_t work_bytes)
{
    if (!w)
        return FP_ERR_ARGUMENT;
    fp_status status = fp_matrix_check(w);
    if (status || !w->rows || !w->cols)
        return status;
    if (out_dtype != FP_F32 && out_dtype != FP_F64)
        return FP_ERR_DTYPE;
    if (w->cols > INT32_MAX / 2)
        return FP_ERR_OVERFLOW;
    if (!mask || !h || !out || !work)
        return FP_ERR_ARGUMENT;
    refit_call c = {.w = w,
                    .mask = mask,
                    .h = h,
                    .rhs = rhs,
                    .out = out,
                    .out_dtype = out_dtype,
                    .rows = w->rows,
                    .cols = w->cols};
    plan(&c);
    threads = fp_clamp_threads(threads);
    if (work_bytes < lay_out(&c, work, threads))
        return FP_ERR_ARGUMENT;
    if (c.any_removed) {
        memcpy(c.factor, h, c.cols * c.cols * sizeof *h);
        status = fp_cholesky(c.factor, c.cols, threads);
        if (status)
            return status;
        fp_cholesky_inverse(c.factor, c.cols, c.inverse, threads);
    }
    size_t tiles = (c.rows + TILE - 1) / TILE;
    fp_parallel_for(tiles, threads, refit_tile, &c);
    for (size_t tile = 0; tile < tiles && !status; tile++)
        status = c.status[tile];
    return status;
}

/* ---- damage ---- */

enum { BLOCK = 128 }; /* columns */

typedef struct damage_call {
    const fp_matrix *w, *w_new;
    const double *c;
    double *numerator, *denominator;
    char *buffers;
    size_t stride;
} damage_call;

/* forms[i] = x_i C x_i^T for the rows of x (rows x n), by the upper triangle of C: a block of
 * columns with itself, and twice with all the columns to its left. */
static void quadratic_forms(const double *c, size_t cols, const double *x, size_t rows, double *y,
                            double *forms)
{
    int32_t n = (int32_t)cols, m = (int32_t)rows;
    for (size_t i = 0; i < rows; i++)
        forms[i] = 0.0;
    for (size_t begin = 0; begin < cols; begin += BLOCK) {
        int32_t left = (int32_t)begin, block = n - left < BLOCK ? n - left : BLOCK;
        const double *corner = c + begin * cols + begin;
        /* column-major, this is the lower triangle: C[.., block] is stored as rows of it */
        fp_dsymm("L", "L", &block, &m, &ONE, corner, &n, x + begin, &n, &ZERO, y, &block, 1, 1);
        if (left)
            fp_dgemm("N", "N", &block, &m, &left, &TWO, c + begin, &n, x, &n, &ONE, y, &block, 1,
                     1);
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < (size_t)block; j++)
                forms[i] += x[i * cols + begin + j] * y[i * (size_t)block + j];
    }
}

static void damage_tile(void *context, size_t tile, int worker)
{
    damage_call *d = context;
    size_t first = tile * TILE, cols = d->w->cols;
    size_t rows = d->w->rows - first < TILE ? d->w->rows - first : TILE;
    double *x = (double *)(void *)(d->buffers + (size_t)worker * d->stride);
    double *other = x + TILE * cols, *y = other + TILE * cols;
    fp_matrix_load(d->w, first, rows, x, cols, 1);
    fp_matrix_load(d->w_new, first, rows, other, cols, 1);
    for (size_t i = 0; i < rows * cols; i++)
        other[i] -= x[i];
    quadratic_forms(d->c, cols, other, rows, y, d->numerator + first);
    quadratic_forms(d->c, cols, x, rows, y, d->denominator + first);
}

static size_t damage_stride(size_t cols)
{
    return TILE * (2 * cols + BLOCK) * sizeof(double);
}

size_t fp_damage_work(size_t cols, int threads)
{
    return (size_t)fp_clamp_threads(threads) * damage_stride(cols);
}

fp_status fp_damage(const fp_matrix *w, const fp_matrix *w_new, const double *c, double *numerator,
                    double *denominator, int threads, void *work, size_t work_bytes)
{
    if (!w || !w_new)
        return FP_ERR_ARGUMENT;
    fp_status status = fp_matrix_check(w);
    if (!status)
        status = fp_matrix_check(w_new);
    if (status || !w->rows)
        return status;
    if (w->rows != w_new->rows || w->cols != w_new->cols)
        return FP_ERR_SHAPE;
    if (w->cols > INT32_MAX / 2)
        return FP_ERR_OVERFLOW;
    if (!c || !numerator || !denominator || !work || work_bytes < fp_damage_work(w->cols, threads))
        return FP_ERR_ARGUMENT;
    damage_call d = {w, w_new, c, numerator, denominator, work, damage_stride(w->cols)};
    fp_parallel_for((w->rows + TILE - 1) / TILE, threads, damage_tile, &d);
    return FP_OK;
}
