/* What a change of weights costs: tr(dW C dW^T) row by row. */
#include "lapack.h"
#include "matrix.h"
#include "parallel.h"

enum { TILE = 96, BLOCK = 128 }; /* rows, columns */
static const double ONE = 1.0, TWO = 2.0, ZERO = 0.0;

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
