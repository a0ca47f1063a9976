/* Softmax attention over folded heads, whose queries and keys have few dimensions, down to one.
 *
 * With rank 1 a query is one number a = scale * q and its output a smooth function of it,
 * F(a) = sum_j softmax_j(a b_j) v_j. The method of nodes evaluates F at p Chebyshev nodes over the
 * range of a (linear in the number of keys) and takes the series through them at every query
 * (linear in the number of queries). Conventions as in foldprune.h.
 */
#ifndef FOLDPRUNE_ATTENTION_H
#define FOLDPRUNE_ATTENTION_H

#include "foldprune.h"

/* Rows of a (batch x heads x rows x columns) array. Strides in elements; columns are contiguous and
 * rows do not overlap: row >= columns. Inputs are never written. */
typedef struct fp_rows {
    void *data;
    ptrdiff_t batch, head, row;
} fp_rows;

typedef enum fp_attention_method {
    FP_ATTENTION_AUTO = 0, /* nodes where they are expected to be faster */
    FP_ATTENTION_EXACT,
    FP_ATTENTION_NODES /* rank 1 alone */
} fp_attention_method;

/* logits = scale q . k; query head h reads key/value head h / (heads / kv_heads). Key j of batch b
 * is visible if key_mask is NULL or key_mask[b * m + j] is not 0 and, with causal, if
 * j <= i + m - n for query i. A query that sees no key gives zeros. */
typedef struct fp_attention {
    fp_dtype dtype; /* FP_F32 or FP_F64, of q, k, v and all that is written */
    size_t batch, heads, kv_heads, n, m, rank, value_dim;
    fp_rows q, k, v;
    double scale;
    int causal;
    const uint8_t *key_mask;
    fp_attention_method method;
    double tol; /* of the nodes' outputs, relative to the head's largest |v|; positive */
    /* In [0, 1): each weight of the softmax is zero with this probability, by `seed`, batch, head,
     * query and key alone, and the others grow by 1 / (1 - dropout). Not with nodes. */
    double dropout;
    uint64_t seed;
} fp_attention;

/* out: rows like q's with value_dim columns. lse (batch x heads x n): log of the sum of exp(logit)
 * over the visible keys, -inf if there is none. nodes (batch x kv_heads): how many were used, 0
 * where the head was computed exactly: because it was asked for, is faster, the tolerance would
 * need too many nodes, or a number is not finite. With FP_F32 a tol below 1e-6 means 1e-6. */
size_t fp_attention_work(const fp_attention *a, int threads);
fp_status fp_attention_forward(const fp_kernels *kernels, const fp_attention *a, fp_rows out,
                               double *lse, int32_t *nodes, int threads, void *work,
                               size_t work_bytes);

/* Gradients of sum(dout * out); out, lse and nodes are fp_attention_forward's. dq, dk, dv have rows
 * like q, k and v. Heads with nodes take linear time here too. */
size_t fp_attention_backward_work(const fp_attention *a, int threads);
fp_status fp_attention_backward(const fp_kernels *kernels, const fp_attention *a, fp_rows out,
                                const double *lse, const int32_t *nodes, fp_rows dout, fp_rows dq,
                                fp_rows dk, fp_rows dv, int threads, void *work, size_t work_bytes);

/* ---- decoding with rank 1: keys and values summed up at the nodes, however many there are ---- */

/* What one layer keeps per batch and key/value head: a softmax over all keys so far for each node.
 * The first four are (batch x kv_heads) arrays, the others have `nodes` rows per head; all are
 * float64, as rounding to float32 at every token would add up. All zero (key_range: inf, -inf) is
 * the state without keys. */
typedef struct fp_nodes_state {
    size_t nodes;             /* a multiple of 16, at most 256 */
    const double *low, *high; /* range of scale * q */
    double *key_range;        /* least and largest key so far */
    double *size;             /* largest |v| */
    double *sum;              /* of the weights */
    double *reference;        /* the key that weights are relative to */
    double *out;              /* weighted sum of the values, x value_dim */
} fp_nodes_state;

size_t fp_nodes_work(const fp_attention *a, int threads);

/* Takes in a's keys and values; a->n is 0. FP_ERR_VALUE if one is not finite, FP_ERR_RANGE if the
 * nodes are too few for the keys' and the queries' range; then the state is as it was. */
fp_status fp_nodes_append(const fp_kernels *kernels, const fp_attention *a,
                          const fp_nodes_state *state, int threads, void *work, size_t work_bytes);

/* Attention of a's queries to all keys so far; a->m is 0. needed (batch x kv_heads): 0, or where
 * the nodes do not reach a->tol how many might. FP_ERR_RANGE if there is such a head, or a query is
 * outside the range; then out is not to be used. */
fp_status fp_nodes_attend(const fp_attention *a, const fp_nodes_state *state, fp_rows out,
                          int32_t *needed, int threads, void *work, size_t work_bytes);

#endif
