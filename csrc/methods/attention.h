/* What the two precisions of attention share; each is compiled from the *_real.h templates by a
 * file of its own. */
#ifndef FOLDPRUNE_METHODS_ATTENTION_H
#define FOLDPRUNE_METHODS_ATTENTION_H

#include "foldprune_attention.h"
#include "kernels.h"

enum {
    FP_TILE_QUERIES = 128,
    FP_TILE_KEYS = 256,  /* logits of a tile stay in the second-level cache */
    FP_TILE_SLICES = 8,  /* at most, of the keys in the backward pass */
    FP_LEAST_NODES = 16, /* their number is always a multiple of this */
    FP_MOST_NODES = 256
};

/* A call, forward or backward. */
typedef struct fp_attention_call {
    const fp_kernels *kernels;
    const fp_attention *a;
    fp_rows out, dout, dq, dk, dv;
    double *lse;
    int32_t *nodes;
    int threads;
    void *work;
} fp_attention_call;

/* How the queries are cut into tiles. Causal tiles begin where tiles of keys begin: query i is at
 * place i + shift of the tiles and sees keys before i + shift + limit. */
typedef struct fp_tiling {
    size_t shift, first, count;
    ptrdiff_t limit;
} fp_tiling;

fp_tiling fp_tiling_of(const fp_attention *a);

/* Slices of the keys in the backward pass: tasks for many threads where heads are few. By the sizes
 * alone, as sums depend on it. */
size_t fp_slices_of(const fp_attention *a);

size_t fp_attention_work_f32(const fp_attention *a, int threads);
size_t fp_attention_work_f64(const fp_attention *a, int threads);
void fp_attention_forward_f32(fp_attention_call *c);
void fp_attention_forward_f64(fp_attention_call *c);
size_t fp_attention_backward_work_f32(const fp_attention *a, int threads);
size_t fp_attention_backward_work_f64(const fp_attention *a, int threads);
void fp_attention_backward_f32(fp_attention_call *c);
void fp_attention_backward_f64(fp_attention_call *c);

/* A call of the state's functions. */
typedef struct fp_nodes_call {
    const fp_kernels *kernels;
    const fp_attention *a;
    const fp_nodes_state *state;
    fp_rows out;
    int32_t *needed;
    int threads;
    void *work;
} fp_nodes_call;

size_t fp_nodes_work_f32(const fp_attention *a, int threads);
size_t fp_nodes_work_f64(const fp_attention *a, int threads);
fp_status fp_nodes_append_f32(fp_nodes_call *c);
fp_status fp_nodes_append_f64(fp_nodes_call *c);
fp_status fp_nodes_attend_f32(fp_nodes_call *c);
fp_status fp_nodes_attend_f64(fp_nodes_call *c);

/* Threads that are worth starting for so many products: about half a millisecond each. */
static inline int fp_threads_for(double products, int threads)
{
    double most = products / 2e7;
    return most < 1 ? 1 : most < threads ? (int)most : threads;
}

static inline int fp_may_have_nodes(const fp_attention *a)
{
    return a->rank == 1 && a->method != FP_ATTENTION_EXACT && !(a->dropout > 0);
}

/* FP_OK if a problem can be worked on. */
fp_status fp_attention_check(const fp_attention *a);

#endif
