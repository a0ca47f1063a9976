/* Exact attention by tiles, with a running softmax as in flash attention (Dao et al. 2022): no
 * matrix of queries by keys is ever stored. A template: see real.h. */
#ifndef FOLDPRUNE_ATTENTION_REAL_H
#define FOLDPRUNE_ATTENTION_REAL_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "attention.h"
#include "parallel.h"
#include "real.h"
#include "work.h"

enum { QUERIES = FP_TILE_QUERIES, KEYS = FP_TILE_KEYS };

static inline size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

#if FP_REAL_DOUBLE
static double row_largest(const fp_kernels *kernels, double *s, const double *hidden, size_t n)
{
    double most = -INFINITY;
    (void)kernels;
    for (size_t j = 0; j < n; j++) {
        if (hidden && signbit(hidden[j]))
            s[j] = -INFINITY;
        most = most > s[j] ? most : s[j];
    }
    return most;
}

static double row_exponentials(const fp_kernels *kernels, double *s, double shift, size_t n)
{
    double sum = 0;
    (void)kernels;
    for (size_t j = 0; j < n; j++)
        sum += s[j] = exp(s[j] - shift);
    return sum;
}

static double row_exponentials1(const fp_kernels *kernels, double a, const double *b,
                                double reference, const double *hidden, size_t n, double *p)
{
    double sum = 0;
    (void)kernels;
    for (size_t j = 0; j < n; j++)
        sum += p[j] = hidden && signbit(hidden[j]) ? 0 : exp(a * (b[j] - reference));
    return sum;
}

static void row_drop(const fp_kernels *kernels, const uint32_t row[2], uint32_t first,
                     uint32_t limit, size_t n, double *p)
{
    (void)kernels;
    for (size_t j = 0; j < n; j++)
        p[j] = fp_is_dropped(row, first + (uint32_t)j, limit) ? -p[j] : p[j];
}
#else
static float row_largest(const fp_kernels *kernels, float *s, const float *hidden, size_t n)
{
    return kernels->softmax->largest(s, hidden, n);
}

static float row_exponentials(const fp_kernels *kernels, float *s, float shift, size_t n)
{
    return kernels->softmax->exponentials(s, shift, n);
}

static float row_exponentials1(const fp_kernels *kernels, float a, const float *b, float reference,
                               const float *hidden, size_t n, float *p)
{
    return kernels->softmax->exponentials1(a, b, reference, hidden, n, p);
}

static void row_drop(const fp_kernels *kernels, const uint32_t row[2], uint32_t first,
                     uint32_t limit, size_t n, float *p)
{
    kernels->softmax->drop(row, first, limit, n, p);
}
#endif

/* ---- pieces ---- */

/* Keys and values that one task reads. */
typedef struct keys {
    const real *k, *v, *hidden; /* hidden: NULL, or negative where a key is masked */
    size_t k_row, v_row, rank, dim;
} keys;

/* A worker's buffers. */
typedef struct scratch {
    real *p, *dp;         /* QUERIES x KEYS: weights, and their gradient */
    real *b, *low, *high; /* KEYS: keys of rank 1; least and largest visible one up to each */
    real *q, *dq;         /* QUERIES x rank */
    real *out, *series;   /* QUERIES x dim */
    double *basis;        /* Chebyshev polynomials of QUERIES numbers, see nodes_real.h */
    real *basis_real, *inner;
} scratch;

/* The softmax of up to QUERIES queries over the keys absorbed so far. With the logits s_j, out =
 * sum_j exp(s_j - shift) v_j and sum likewise without v, where shift is the reference, or with rank
 * 1 that times q: then the reference is the key of largest logit. */
typedef struct rows {
    const real *q; /* count x rank, times the scale */
    real *out;     /* count x dim */
    real *reference;
    double *sum;
    uint8_t *seen; /* whether there was a visible key */
    size_t count;
} rows;

typedef struct row_arrays {
    real reference[QUERIES];
    double sum[QUERIES];
    uint8_t seen[QUERIES];
} row_arrays;

static rows rows_new(row_arrays *arrays, const real *q, real *out, size_t count, size_t dim)
{
    memset(arrays->seen, 0, count);
    memset(out, 0, count * dim * sizeof *out);
    return (rows){q, out, arrays->reference, arrays->sum, arrays->seen, count};
}

static inline real *at(const fp_rows *r, size_t batch, size_t head, size_t row)
{
    return (real *)r->data + (ptrdiff_t)batch * r->batch + (ptrdiff_t)head * r->head +
           (ptrdiff_t)row * r->row;
}

static keys keys_of(const fp_attention *a, size_t batch, size_t kv_head, const real *hidden)
{
    return (keys){.k = at(&a->k, batch, kv_head, 0),
                  .v = at(&a->v, batch, kv_head, 0),
                  .hidden = hidden ? hidden + batch * a->m : NULL,
                  .k_row = (size_t)a->k.row,
                  .v_row = (size_t)a->v.row,
                  .rank = a->rank,
                  .dim = a->value_dim};
}

static void load_queries(const fp_attention *a, size_t batch, size_t head, size_t first,
                         size_t count, real *q)
{
    const real scale = (real)a->scale;
    for (size_t i = 0; i < count; i++) {
        const real *from = at(&a->q, batch, head, first + i);
        for (size_t c = 0; c < a->rank; c++)
            q[i * a->rank + c] = scale * from[c];
    }
}

/* The first of `width` keys that is not masked; width if all are. */
static size_t first_visible(const real *hidden, size_t width)
{
    size_t j = 0;
    while (hidden && j < width && signbit(hidden[j]))
        j++;
    return j;
}

/* Keys of rank 1 in a row, and the range of the visible ones up to each: the largest logit of a row
 * belongs to one of its ends. */
static void load_keys(const keys *ks, size_t begin, size_t width, scratch *s)
{
    real low = INFINITY, high = -INFINITY;
    for (size_t j = 0; j < width; j++) {
        real b = ks->k[(begin + j) * ks->k_row];
        s->b[j] = b;
        if (!ks->hidden || !signbit(ks->hidden[begin + j])) {
            low = b < low ? b : low;
            high = b > high ? b : high;
        }
        s->low[j] = low;
        s->high[j] = high;
    }
}

/* Dropout of a tile: its first row is this one of all queries of all heads. */
typedef struct dropout {
    uint64_t seed, first;
    uint32_t limit;
} dropout;

/* NULL if there is none. */
static const dropout *dropout_of(const fp_attention *a, size_t batch, size_t head, size_t query,
                                 dropout *d)
{
    *d = (dropout){.seed = a->seed,
                   .first = ((uint64_t)batch * a->heads + head) * a->n + query,
                   .limit = fp_drop_limit(a->dropout)};
    return a->dropout > 0 ? d : NULL;
}

/* Gives the weights of row i that are dropped the other sign. */
static void drop_row(const fp_kernels *kernels, const dropout *d, size_t i, size_t begin, size_t n,
                     real *p)
{
    uint32_t row[2];
    fp_drop_row(d->seed, d->first + i, row);
    row_drop(kernels, row, (uint32_t)begin, d->limit, n, p);
}

static void without_dropped(const real *p, size_t n, real *kept)
{
    for (size_t j = 0; j < n; j++)
        kept[j] = p[j] > 0 ? p[j] : 0;
}

/* How many of `width` keys from `begin` on a row with this limit sees. */
static inline size_t seen_by(ptrdiff_t limit, size_t begin, size_t width)
{
    ptrdiff_t seen = limit - (ptrdiff_t)begin;
    return seen < 0 ? 0 : least((size_t)seen, width);
}

static void scale_row(real *x, size_t n, real factor)
{
    for (size_t j = 0; j < n; j++)
        x[j] *= factor;
}

/* ---- forward ---- */

/* One row's weights for `seen` keys, in p; the rest of the row follows the new reference. */
static void weigh(const fp_kernels *kernels, rows *r, size_t i, const keys *ks, size_t begin,
                  size_t seen, real *p, const scratch *s)
{
    const real *hidden = ks->hidden ? ks->hidden + begin : NULL;
    real reference, added, old = r->reference[i];
    double factor = 0;
    if (ks->rank == 1) {
        real a = r->q[i];
        reference = a >= 0 ? s->high[seen - 1] : s->low[seen - 1];
        if (r->seen[i]) {
            if (a >= 0 ? old > reference : old < reference)
                reference = old;
            factor = exp((double)a * ((double)old - (double)reference));
        }
        added = row_exponentials1(kernels, a, s->b, reference, hidden, seen, p);
    } else {
        reference = row_largest(kernels, p, hidden, seen);
        if (r->seen[i] && old > reference)
            reference = old;
        /* nothing but -inf or NaN: 0 / 0 and NaN in the end, as by the definition */
        real shift = reference == -INFINITY ? 0 : reference;
        if (r->seen[i])
            factor = exp((double)old - (double)shift);
        added = row_exponentials(kernels, p, shift, seen);
    }
    if (!r->seen[i]) {
        r->sum[i] = added;
    } else {
        r->sum[i] = r->sum[i] * factor + added;
        if (factor != 1)
            scale_row(r->out + i * ks->dim, ks->dim, (real)factor);
    }
    r->reference[i] = reference;
    r->seen[i] = 1;
}

/* Takes in keys begin .. end; row i sees those before limit + i * step. `drops` may be NULL. */
static void absorb(const fp_kernels *kernels, rows *r, const keys *ks, size_t begin, size_t end,
                   ptrdiff_t limit, int step, const dropout *drops, scratch *s)
{
    ptrdiff_t last = limit + (ptrdiff_t)(r->count - 1) * step;
    end = last < 0 ? 0 : least(end, (size_t)last);
    for (; begin < end; begin += KEYS) {
        size_t width = least(KEYS, end - begin);
        size_t first = first_visible(ks->hidden ? ks->hidden + begin : NULL, width);
        if (first == width)
            continue;
        if (ks->rank == 1)
            load_keys(ks, begin, width, s);
        else
            multiply('N', 'T', r->count, width, ks->rank, r->q, ks->rank, ks->k + begin * ks->k_row,
                     ks->k_row, 0, s->p, KEYS);
        for (size_t i = 0; i < r->count; i++) {
            size_t seen = seen_by(limit + (ptrdiff_t)i * step, begin, width);
            real *p = s->p + i * KEYS;
            if (seen <= first)
                seen = 0;
            else
                weigh(kernels, r, i, ks, begin, seen, p, s);
            if (drops) {
                drop_row(kernels, drops, i, begin, seen, p);
                without_dropped(p, seen, p);
            }
            memset(p + seen, 0, (width - seen) * sizeof *p);
        }
        if (ks->dim)
            multiply('N', 'N', r->count, ks->dim, width, s->p, KEYS, ks->v + begin * ks->v_row,
                     ks->v_row, 1, r->out, ks->dim);
    }
}

static double row_lse(const rows *r, size_t i, size_t rank)
{
    if (!r->seen[i])
        return -INFINITY;
    double shift = r->reference[i];
    return (rank == 1 ? shift * r->q[i] : shift) + log(r->sum[i]);
}

/* Where a query tile stands, and what its rows see. */
typedef struct tile {
    size_t query, count;
    ptrdiff_t limit;
    int step;
} tile;

static tile tile_at(const fp_attention *a, const fp_tiling *t, size_t index)
{
    size_t begin = (t->first + index) * QUERIES, end = least(begin + QUERIES, a->n + t->shift);
    begin = begin < t->shift ? t->shift : begin;
    ptrdiff_t limit = a->causal ? (ptrdiff_t)begin + t->limit : (ptrdiff_t)a->m;
    return (tile){begin - t->shift, end - begin, limit, a->causal};
}

static void exact_tile(const fp_attention_call *c, const keys *ks, size_t batch, size_t head,
                       tile t, scratch *s)
{
    const fp_attention *a = c->a;
    row_arrays arrays;
    rows r = rows_new(&arrays, s->q, s->out, t.count, ks->dim);
    load_queries(a, batch, head, t.query, t.count, s->q);
    dropout d;
    absorb(c->kernels, &r, ks, 0, a->m, t.limit, t.step, dropout_of(a, batch, head, t.query, &d),
           s);
    for (size_t i = 0; i < t.count; i++) {
        real *out = at(&c->out, batch, head, t.query + i), *from = s->out + i * ks->dim;
        real factor = r.seen[i] ? (real)(1 / (r.sum[i] * (1 - a->dropout))) : 0;
        for (size_t j = 0; j < ks->dim; j++)
            out[j] = from[j] * factor;
        c->lse[(batch * a->heads + head) * a->n + t.query + i] = row_lse(&r, i, ks->rank);
    }
}

/* ---- backward ---- */

/* Queries and gradients of a tile. With p_ij = exp(s_ij - lse_i) = weight_i exp(s_ij - shift_i),
 * the weight is in dout and dot already, and in dout what weights grow by as others are dropped;
 * reference as in rows. */
typedef struct gradients {
    const real *q, *dout; /* count x rank, count x dim */
    real *dq;             /* count x rank, without the scale; added to */
    real reference[QUERIES];
    real dot[QUERIES]; /* dout_i . out_i */
    size_t count;
} gradients;

/* The reference that makes the exponents those of the softmax itself, so far as it is exact, and
 * the weight that makes up for its rounding. */
static real split_lse(double lse, const real *q, size_t rank, double *weight)
{
    double shift;
    real reference = (real)lse;
    if (rank == 1) {
        reference = (real)(lse / *q);
        if (!(fabs((double)reference) < 1e30)) /* a logit of about 0: any reference does */
            reference = 0;
        shift = (double)*q * (double)reference;
    } else {
        shift = reference;
    }
    *weight = exp(shift - lse);
    return reference;
}

/* s->q is loaded. */
static void load_gradients(const fp_attention_call *c, size_t batch, size_t head, tile t,
                           gradients *g, scratch *s)
{
    size_t dim = c->a->value_dim, rank = c->a->rank;
    g->q = s->q;
    g->dout = s->out;
    g->dq = s->dq;
    g->count = t.count;
    memset(s->dq, 0, t.count * rank * sizeof *s->dq);
    for (size_t i = 0; i < t.count; i++) {
        double lse = c->lse[(batch * c->a->heads + head) * c->a->n + t.query + i];
        double dot = 0, weight = 0;
        g->reference[i] = 0;
        if (lse != -INFINITY) /* else the row sees nothing and is never read */
            g->reference[i] = split_lse(lse, s->q + i * rank, rank, &weight);
        const real *dout = at(&c->dout, batch, head, t.query + i);
        const real *out = at(&c->out, batch, head, t.query + i);
        for (size_t j = 0; j < dim; j++) {
            dot += (double)dout[j] * (double)out[j];
            s->out[i * dim + j] = (real)(weight / (1 - c->a->dropout) * dout[j]);
        }
        g->dot[i] = (real)(weight * dot);
    }
}

/* Adds what keys begin .. end give to g->dq and receive in dk and dv (rows from key 0 on). */
static void spread(const fp_kernels *kernels, gradients *g, const keys *ks, size_t begin,
                   size_t end, ptrdiff_t limit, int step, real *dk, size_t dk_row, real *dv,
                   size_t dv_row, const dropout *drops, scratch *s)
{
    ptrdiff_t last = limit + (ptrdiff_t)(g->count - 1) * step;
    end = last < 0 ? 0 : least(end, (size_t)last);
    for (; begin < end; begin += KEYS) {
        size_t width = least(KEYS, end - begin);
        const real *hidden = ks->hidden ? ks->hidden + begin : NULL;
        size_t first = first_visible(hidden, width);
        if (first == width)
            continue;
        if (ks->rank == 1)
            load_keys(ks, begin, width, s);
        else
            multiply('N', 'T', g->count, width, ks->rank, g->q, ks->rank, ks->k + begin * ks->k_row,
                     ks->k_row, 0, s->p, KEYS);
        for (size_t i = 0; i < g->count; i++) {
            size_t seen = seen_by(limit + (ptrdiff_t)i * step, begin, width);
            real *p = s->p + i * KEYS;
            if (seen <= first) {
                seen = 0;
            } else if (ks->rank == 1) {
                row_exponentials1(kernels, g->q[i], s->b, g->reference[i], hidden, seen, p);
            } else {
                if (hidden)
                    row_largest(kernels, p, hidden, seen);
                row_exponentials(kernels, p, g->reference[i], seen);
            }
            memset(p + seen, 0, (width - seen) * sizeof *p);
            if (drops) {
                drop_row(kernels, drops, i, begin, seen, p);
                without_dropped(p, width, s->dp + i * KEYS);
            }
        }
        if (ks->dim) {
            const real *v = ks->v + begin * ks->v_row, *kept = drops ? s->dp : s->p;
            multiply('T', 'N', width, ks->dim, g->count, kept, KEYS, g->dout, ks->dim, 1,
                     dv + begin * dv_row, dv_row);
            multiply('N', 'T', g->count, width, ks->dim, g->dout, ks->dim, v, ks->v_row, 0, s->dp,
                     KEYS);
        } else {
            memset(s->dp, 0, g->count * KEYS * sizeof *s->dp);
        }
        for (size_t i = 0; i < g->count; i++) {
            real *p = s->p + i * KEYS, *dp = s->dp + i * KEYS;
            for (size_t j = 0; j < width && drops; j++) /* -p (2 dot - dot) = p (0 - dot) */
                dp[j] = signbit(p[j]) ? 2 * g->dot[i] : dp[j];
            for (size_t j = 0; j < width; j++)
                p[j] *= dp[j] - g->dot[i];
        }
        if (ks->rank) {
            multiply('N', 'N', g->count, ks->rank, width, s->p, KEYS, ks->k + begin * ks->k_row,
                     ks->k_row, 1, g->dq, ks->rank);
            multiply('T', 'N', width, ks->rank, g->count, s->p, KEYS, g->q, ks->rank, 1,
                     dk + begin * dk_row, dk_row);
        }
    }
}

/* All queries of one key/value head against keys begin .. end. dq (heads of the group x n x rank)
 * is written. */
static void exact_slice(const fp_attention_call *c, const keys *ks, size_t batch, size_t kv_head,
                        size_t begin, size_t end, real *dq, scratch *s)
{
    const fp_attention *a = c->a;
    const fp_tiling tiling = fp_tiling_of(a);
    size_t group = a->heads / a->kv_heads;
    gradients g;
    dropout d;
    for (size_t h = 0; h < group; h++) {
        for (size_t i = 0; i < tiling.count; i++) {
            size_t head = kv_head * group + h;
            tile t = tile_at(a, &tiling, i);
            load_queries(a, batch, head, t.query, t.count, s->q);
            load_gradients(c, batch, head, t, &g, s);
            spread(c->kernels, &g, ks, begin, end, t.limit, t.step, at(&c->dk, batch, kv_head, 0),
                   (size_t)c->dk.row, at(&c->dv, batch, kv_head, 0), (size_t)c->dv.row,
                   dropout_of(a, batch, head, t.query, &d), s);
            memcpy(dq + (h * a->n + t.query) * a->rank, s->dq, t.count * a->rank * sizeof *dq);
        }
    }
}

#endif
