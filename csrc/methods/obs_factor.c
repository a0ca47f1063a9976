/* UDU^T of H for the OBS sweep: the Cholesky factor of H with rows and columns in reverse order. */
#include <string.h>

#include "cholesky.h"
#include "parallel.h"

enum { STRIP = 32 }; /* rows that one item of work takes */

typedef struct factor_call {
    const double *h;
    size_t n;
    double *l; /* of H with rows and columns in reverse order */
    float *a;
    double *d;
} factor_call;

static void reverse_rows(void *context, size_t item, int worker)
{
    factor_call *c = context;
    size_t n = c->n, end = (item + 1) * STRIP < n ? (item + 1) * STRIP : n;
    (void)worker;
    for (size_t i = item * STRIP; i < end; i++)
        for (size_t j = 0; j < n; j++)
            c->l[i * n + j] = c->h[(n - 1 - i) * n + n - 1 - j];
}

static void scale_rows(void *context, size_t item, int worker)
{
    factor_call *c = context;
    size_t n = c->n, end = (item + 1) * STRIP < n ? (item + 1) * STRIP : n;
    (void)worker;
    for (size_t i = item * STRIP; i < end; i++)
        memset(c->a + i * n, 0, (i + 1) * sizeof *c->a);
    for (size_t j = item * STRIP + 1; j < n; j++) {
        const double *column = c->l + (n - 1 - j) * n; /* column-major */
        double scale = 1.0 / column[n - 1 - j];
        for (size_t i = item * STRIP; i < end && i < j; i++)
            c->a[i * n + j] = (float)(column[n - 1 - i] * scale);
    }
}

size_t fp_obs_factor_work(size_t cols)
{
    return cols * cols * sizeof(double);
}

fp_status fp_obs_factor(const double *h, size_t cols, float *a, double *d, int threads, void *work,
                        size_t work_bytes)
{
    if (!cols)
        return FP_OK;
    if (cols > INT32_MAX / 2)
        return FP_ERR_OVERFLOW;
    if (!h || !a || !d || !work || work_bytes < fp_obs_factor_work(cols))
        return FP_ERR_ARGUMENT;
    factor_call c = {h, cols, work, a, d};
    size_t strips = (cols + STRIP - 1) / STRIP;
    fp_parallel_for(strips, threads, reverse_rows, &c);
    fp_status status = fp_cholesky(c.l, cols, threads);
    if (status)
        return status;
    for (size_t j = 0; j < cols; j++) {
        double root = c.l[(cols - 1 - j) * (cols + 1)];
        d[j] = root * root;
    }
    fp_parallel_for(strips, threads, scale_rows, &c);
    return FP_OK;
}
