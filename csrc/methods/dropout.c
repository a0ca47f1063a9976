/* Dropout of activations, by counters: which numbers fall away depends on the seed and their places
 * alone, so that threads need no generator to share and the backward pass no mask. */
#include <stdint.h>

#include "foldprune.h"
#include "kernels.h"
#include "parallel.h"

enum { ROW = 1024 }; /* numbers that share two random ones */

typedef struct dropout_call {
    const fp_kernels *kernels;
    const void *x;
    void *y;
    fp_dtype dtype;
    size_t n;
    double p;
    uint64_t seed;
} dropout_call;

/* Products with 0, as torch has them: NaN stays NaN. */
#define DEFINE_THIN(type)                                                                          \
    static void thin_##type(const type *x, const float *sign, type factor, size_t n, type *y)      \
    {                                                                                              \
        for (size_t j = 0; j < n; j++)                                                             \
            y[j] = x[j] * (sign[j] > 0 ? factor : 0);                                              \
    }

DEFINE_THIN(float)
DEFINE_THIN(double)

static void thin_row(void *context, size_t item, int worker)
{
    const dropout_call *c = context;
    size_t begin = item * ROW, n = c->n - begin < ROW ? c->n - begin : ROW;
    double factor = 1 / (1 - c->p);
    float sign[ROW];
    uint32_t row[2];
    (void)worker;
    for (size_t j = 0; j < ROW; j++)
        sign[j] = 1;
    fp_drop_row(c->seed, item, row);
    c->kernels->softmax->drop(row, 0, fp_drop_limit(c->p), n, sign);
    if (c->dtype == FP_F32)
        thin_float((const float *)c->x + begin, sign, (float)factor, n, (float *)c->y + begin);
    else
        thin_double((const double *)c->x + begin, sign, factor, n, (double *)c->y + begin);
}

fp_status fp_dropout(const fp_kernels *kernels, const void *x, fp_dtype dtype, size_t n, double p,
                     uint64_t seed, void *y, int threads)
{
    dropout_call c = {
        .kernels = kernels, .x = x, .y = y, .dtype = dtype, .n = n, .p = p, .seed = seed};
    if (!kernels || (n && (!x || !y)))
        return FP_ERR_ARGUMENT;
    if (dtype != FP_F32 && dtype != FP_F64)
        return FP_ERR_DTYPE;
    if (!(p >= 0 && p < 1))
        return FP_ERR_RANGE;
    fp_parallel_for(n / ROW + (n % ROW > 0), threads, thin_row, &c);
    return FP_OK;
}
