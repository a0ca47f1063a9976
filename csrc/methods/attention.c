/* Attention: checks, and the choice of precision. */
#include "attention.h"

#include <math.h>

#include "parallel.h"

static int fits(size_t a, size_t b)
{
    return !b || a <= PTRDIFF_MAX / 16 / b;
}

static int rows_fit(const fp_rows *r, size_t columns)
{
    return r->row >= (ptrdiff_t)columns && r->row <= INT32_MAX;
}

fp_status fp_attention_check(const fp_attention *a)
{
    if (!a || a->causal < 0 || a->causal > 1 || a->method > FP_ATTENTION_NODES)
        return FP_ERR_ARGUMENT;
    if (a->dtype != FP_F32 && a->dtype != FP_F64)
        return FP_ERR_DTYPE;
    if (!a->kv_heads || a->heads % a->kv_heads || (a->method == FP_ATTENTION_NODES && a->rank != 1))
        return FP_ERR_SHAPE;
    if (!(a->dropout >= 0 && a->dropout < 1) || (a->dropout > 0 && a->method == FP_ATTENTION_NODES))
        return FP_ERR_RANGE;
    if (!isfinite(a->scale) || !isfinite(a->tol) || a->tol <= 0)
        return FP_ERR_VALUE;
    if (a->rank > INT32_MAX || a->value_dim > INT32_MAX || !fits(a->batch, a->heads) ||
        !fits(a->batch * a->heads, a->n) || !fits(a->batch * a->heads, a->m) ||
        !fits(a->batch * a->heads * a->n, a->rank) || !fits(a->batch * a->heads * a->m, a->rank) ||
        !fits(a->batch * a->heads * a->n, a->value_dim) ||
        !fits(a->batch * a->heads * a->m, a->value_dim))
        return FP_ERR_OVERFLOW;
    if (!rows_fit(&a->q, a->rank) || !rows_fit(&a->k, a->rank) || !rows_fit(&a->v, a->value_dim))
        return FP_ERR_SHAPE;
    return FP_OK;
}

/* Zero, or a number of nodes that the forward pass may have chosen. */
static int nodes_sound(const fp_attention *a, const int32_t *nodes)
{
    for (size_t i = 0; i < a->batch * a->kv_heads; i++) {
        if (nodes[i] && (!fp_may_have_nodes(a) || !a->n || !a->m || nodes[i] < 0 ||
                         nodes[i] > FP_MOST_NODES || nodes[i] % FP_LEAST_NODES))
            return 0;
    }
    return 1;
}

fp_tiling fp_tiling_of(const fp_attention *a)
{
    fp_tiling t = {0, 0, a->n / FP_TILE_QUERIES + (a->n % FP_TILE_QUERIES != 0), 0};
    if (!a->causal)
        return t;
    if (a->n > a->m) { /* whole tiles more than there are keys */
        size_t blind = (a->n - a->m + FP_TILE_QUERIES - 1) / FP_TILE_QUERIES * FP_TILE_QUERIES;
        t.shift = blind - (a->n - a->m);
        t.limit = 1 - (ptrdiff_t)blind;
    } else {
        t.shift = a->m - a->n;
        t.limit = 1;
    }
    t.first = t.shift / FP_TILE_QUERIES;
    t.count = a->n ? (t.shift + a->n - 1) / FP_TILE_QUERIES + 1 - t.first : 0;
    return t;
}

size_t fp_slices_of(const fp_attention *a)
{
    size_t heads = a->batch * a->kv_heads, slices = heads ? (16 + heads - 1) / heads : 1;
    size_t tiles = a->m / (4 * FP_TILE_KEYS) + 1;
    slices = slices < tiles ? slices : tiles;
    return slices < FP_TILE_SLICES ? slices : FP_TILE_SLICES;
}

/* Threads for a call, of those that its workspace was made for. */
static int threads_of(const fp_attention *a, int threads)
{
    double heads = (double)a->batch * (double)a->heads, n = (double)a->n, m = (double)a->m;
    double pairs = a->causal ? 0.5 * n * m : n * m, linear = 64 * (n + m);
    if (fp_may_have_nodes(a) && linear < pairs)
        pairs = linear;
    double products = pairs * ((double)a->rank + (double)a->value_dim + 16);
    return fp_threads_for(heads * products, fp_clamp_threads(threads));
}

size_t fp_attention_work(const fp_attention *a, int threads)
{
    if (fp_attention_check(a))
        return 0;
    threads = fp_clamp_threads(threads);
    return a->dtype == FP_F64 ? fp_attention_work_f64(a, threads)
                              : fp_attention_work_f32(a, threads);
}

fp_status fp_attention_forward(const fp_kernels *kernels, const fp_attention *a, fp_rows out,
                               double *lse, int32_t *nodes, int threads, void *work,
                               size_t work_bytes)
{
    fp_status status = fp_attention_check(a);
    if (status)
        return status;
    if (!rows_fit(&out, a->value_dim))
        return FP_ERR_SHAPE;
    if (!kernels || !lse || !nodes || !work || work_bytes < fp_attention_work(a, threads))
        return FP_ERR_ARGUMENT;
    fp_attention_call c = {.kernels = kernels,
                           .a = a,
                           .out = out,
                           .lse = lse,
                           .nodes = nodes,
                           .threads = threads_of(a, threads),
                           .work = work};
    if (a->dtype == FP_F64)
        fp_attention_forward_f64(&c);
    else
        fp_attention_forward_f32(&c);
    return FP_OK;
}

size_t fp_attention_backward_work(const fp_attention *a, int threads)
{
    if (fp_attention_check(a))
        return 0;
    threads = fp_clamp_threads(threads);
    return a->dtype == FP_F64 ? fp_attention_backward_work_f64(a, threads)
                              : fp_attention_backward_work_f32(a, threads);
}

fp_status fp_attention_backward(const fp_kernels *kernels, const fp_attention *a, fp_rows out,
                                const double *lse, const int32_t *nodes, fp_rows dout, fp_rows dq,
                                fp_rows dk, fp_rows dv, int threads, void *work, size_t work_bytes)
{
    fp_status status = fp_attention_check(a);
    if (status)
        return status;
    if (!rows_fit(&out, a->value_dim) || !rows_fit(&dout, a->value_dim) ||
        !rows_fit(&dv, a->value_dim) || !rows_fit(&dq, a->rank) || !rows_fit(&dk, a->rank))
        return FP_ERR_SHAPE;
    if (!kernels || !lse || !nodes || !work || work_bytes < fp_attention_backward_work(a, threads))
        return FP_ERR_ARGUMENT;
    if (!nodes_sound(a, nodes))
        return FP_ERR_RANGE;
    fp_attention_call c = {.kernels = kernels,
                           .a = a,
                           .out = out,
                           .dout = dout,
                           .dq = dq,
                           .dk = dk,
                           .dv = dv,
                           .lse = (double *)(uintptr_t)lse,
                           .nodes = (int32_t *)(uintptr_t)nodes,
                           .threads = threads_of(a, threads),
                           .work = work};
    if (a->dtype == FP_F64)
        fp_attention_backward_f64(&c);
    else
        fp_attention_backward_f32(&c);
    return FP_OK;
}
