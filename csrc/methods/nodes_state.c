/* Decoding by nodes: checks, and the choice of precision. */
#include "attention.h"
#include "parallel.h"

size_t fp_nodes_work(const fp_attention *a, int threads)
{
    if (fp_attention_check(a) || a->rank != 1)
        return 0;
    threads = fp_clamp_threads(threads);
    return a->dtype == FP_F64 ? fp_nodes_work_f64(a, threads) : fp_nodes_work_f32(a, threads);
}

static fp_status check(const fp_attention *a, const fp_nodes_state *s, const void *work,
                       size_t work_bytes, int threads)
{
    fp_status status = fp_attention_check(a);
    if (status)
        return status;
    if (a->rank != 1)
        return FP_ERR_SHAPE;
    if (!s || !s->low || !s->high || !s->key_range || !s->size || !s->sum || !s->reference ||
        !s->out || !work || work_bytes < fp_nodes_work(a, threads))
        return FP_ERR_ARGUMENT;
    if (!s->nodes || s->nodes > FP_MOST_NODES || s->nodes % FP_LEAST_NODES)
        return FP_ERR_RANGE;
    return FP_OK;
}

static int threads_of(const fp_attention *a, const fp_nodes_state *s, int threads)
{
    double rows = (double)a->batch * (double)a->heads * (double)(a->n + a->m + s->nodes / 4);
    return fp_threads_for(rows * (double)s->nodes * ((double)a->value_dim + 16),
                          fp_clamp_threads(threads));
}

fp_status fp_nodes_append(const fp_kernels *kernels, const fp_attention *a,
                          const fp_nodes_state *state, int threads, void *work, size_t work_bytes)
{
    fp_status status = check(a, state, work, work_bytes, threads);
    if (status)
        return status;
    if (!kernels || a->n)
        return FP_ERR_ARGUMENT;
    fp_nodes_call c = {.kernels = kernels,
                       .a = a,
                       .state = state,
                       .threads = threads_of(a, state, threads),
                       .work = work};
    return a->dtype == FP_F64 ? fp_nodes_append_f64(&c) : fp_nodes_append_f32(&c);
}

fp_status fp_nodes_attend(const fp_attention *a, const fp_nodes_state *state, fp_rows out,
                          int32_t *needed, int threads, void *work, size_t work_bytes)
{
    fp_status status = check(a, state, work, work_bytes, threads);
    if (status)
        return status;
    if (!needed || a->m)
        return FP_ERR_ARGUMENT;
    if (out.row < (ptrdiff_t)a->value_dim)
        return FP_ERR_SHAPE;
    fp_nodes_call c = {.a = a,
                       .state = state,
                       .out = out,
                       .needed = needed,
                       .threads = threads_of(a, state, threads),
                       .work = work};
    return a->dtype == FP_F64 ? fp_nodes_attend_f64(&c) : fp_nodes_attend_f32(&c);
}
