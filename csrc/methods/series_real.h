/* Chebyshev series of rank-1 attention: where their nodes and prefixes are, from values at the
 * nodes to terms, whether those do, and the basis at queries. A template: see real.h.
 *
 * F(a) = sum_j softmax_j(a b_j) v_j and L(a) = log sum_j exp(a b_j) are analytic for |Im a| < pi /
 * (largest b - least b): their series fall off geometrically, and they cannot have a feature that
 * much narrower than the spacing of nodes would miss. p nodes give p terms of both. */
#ifndef FOLDPRUNE_SERIES_REAL_H
#define FOLDPRUNE_SERIES_REAL_H

#include "attention_real.h"

#define PI 3.14159265358979323846

enum {
    NODES_STEP = FP_LEAST_NODES,
    MOST_TERMS = FP_MOST_NODES,
    GROUPS = MOST_TERMS / QUERIES /* of nodes, which are absorbed as tiles of queries */
};

/* Series of one batch and key/value head. */
typedef struct series {
    size_t terms;               /* 0: the head is computed exactly */
    size_t chunk, first, count; /* prefixes of (first + i) * chunk keys; not causal: of all keys */
    double middle, half;        /* of the range of a */
    real *f;                    /* count x terms x dim */
    double *l, *lse;            /* count x terms: series of L, and L at the nodes */
} series;

/* What depends on the number of nodes alone. */
typedef struct node_tables {
    double *unit;      /* terms: the nodes of [-1, 1] */
    double *to_series; /* terms x terms: values at the nodes to terms */
    real *to_series_real;
} node_tables;

/* A worker's buffers for series. */
typedef struct node_work {
    node_tables tables;
    real *q, *sums, *values, *carry; /* MOST_TERMS (x dim) */
    double *dot;                     /* MOST_TERMS: a number per node */
    row_arrays *arrays;              /* GROUPS */
} node_work;

/* Keys per chunk, whole tiles: in proportion to the nodes, so that the exact part costs about as
 * much as the series, and the series take at most a quarter of the room that the values do. */
static size_t chunk_of(size_t terms)
{
    return (4 * terms + QUERIES - 1) / QUERIES * QUERIES;
}

static void place_prefixes(const fp_attention *a, size_t terms, series *out)
{
    out->chunk = a->causal ? chunk_of(terms) : a->m;
    out->first = 1;
    out->count = 1;
    if (a->causal) {
        size_t first = a->m > a->n ? (a->m - a->n) / out->chunk : 0;
        size_t last = a->m ? (a->m - 1) / out->chunk : 0;
        out->first = first ? first : 1;
        out->count = last < out->first ? 0 : last - out->first + 1;
    }
}

/* Terms that there must be room for, however many are chosen. */
static size_t terms_capacity(const fp_attention *a)
{
    size_t most = 0;
    for (size_t terms = NODES_STEP; terms <= MOST_TERMS; terms += NODES_STEP) {
        series s;
        place_prefixes(a, terms, &s);
        most = s.count * terms > most ? s.count * terms : most;
    }
    return most;
}

/* ---- values at the nodes to terms ---- */

static void fill_unit(size_t terms, node_tables *tables)
{
    for (size_t t = 0; t < terms; t++)
        tables->unit[t] = cos(PI * (double)t / (double)(terms - 1));
}

/* to_series for the terms from `from` on. */
static void fill_tables(size_t terms, size_t from, node_tables *tables)
{
    size_t n = terms - 1;
    fill_unit(terms, tables);
    for (size_t k = from; k <= n; k++) {
        double *to = tables->to_series + k * terms;
        real *to_real = tables->to_series_real + k * terms;
        for (size_t t = 0, angle = 0; t <= n; t++) { /* angle: k t modulo 2 n */
            double halved = (k == 0 || k == n ? 0.5 : 1.0) * (t == 0 || t == n ? 0.5 : 1.0);
            to[t] = halved * 2 / (double)n * tables->unit[angle <= n ? angle : 2 * n - angle];
            to_real[t] = (real)to[t];
            angle += k;
            angle -= angle >= 2 * n ? 2 * n : 0;
        }
    }
}

static double node(const series *s, const node_work *w, size_t t)
{
    return s->middle + s->half * w->tables.unit[t];
}

/* Terms from `from` on. */
static void lse_series(const double *lse, size_t terms, size_t from, const node_work *w, double *l)
{
    for (size_t k = from; k < terms; k++) {
        double sum = 0;
        for (size_t t = 0; t < terms; t++)
            sum += w->tables.to_series[k * terms + t] * lse[t];
        l[k] = sum;
    }
}

static void values_series(size_t terms, size_t dim, size_t from, const node_work *w, real *f)
{
    if (dim)
        multiply('N', 'N', terms - from, dim, terms, w->tables.to_series_real + from * terms, terms,
                 w->values, dim, 0, f + from * dim, dim);
}

/* What the terms from .. to - 1 of F add up to at most, in the worst column, over the size of the
 * values; or those of L, if that is more. NaN where there is one. */
static double part_of_series(const real *f, const double *l, size_t dim, size_t from, size_t to,
                             double size)
{
    double worst = 0;
    for (size_t k = from; k < to; k++)
        worst += fabs(l[k]);
    worst *= size;
    for (size_t j = 0; j < dim; j++) {
        double sum = 0;
        for (size_t k = from; k < to; k++)
            sum += fabs((double)f[k * dim + j]);
        if (sum > worst || isnan(sum))
            worst = sum; /* once NaN it stays so */
    }
    return worst / size;
}

/* 0 if the series is good to tol, else how many terms might do; by its last two quarters. If terms
 * fall by a factor of 3 or more over a quarter of them, what was left out and what it was mistaken
 * for come to less than the last quarter. */
static size_t terms_needed(const real *f, const double *l, size_t terms, size_t dim, double tol,
                           double size)
{
    size_t quarter = terms / 4;
    double last = part_of_series(f, l, dim, terms - quarter, terms, size);
    double before = part_of_series(f, l, dim, terms - 2 * quarter, terms - quarter, size);
    if (last <= tol)
        return 0;
    double quarters = log(last / tol) / log(before / last);
    if (!(quarters > 0 && quarters < 4)) /* no decay yet, or NaN */
        return 2 * terms;
    size_t more = (size_t)(quarters * (double)quarter) / NODES_STEP + 1;
    return terms + more * NODES_STEP;
}

/* ---- evaluation of the series ---- */

/* T_k(x_i) of s->terms terms x QUERIES, for queries in work->q; zero queries up to whole vectors.
 */
static void fill_basis(const series *s, size_t count, double x[QUERIES], scratch *work)
{
    size_t lanes = (count + 7) / 8 * 8;
    for (size_t i = 0; i < lanes; i++) {
        double at_i = i < count ? ((double)work->q[i] - s->middle) / s->half : 0;
        x[i] = at_i < -1 ? -1 : at_i > 1 ? 1 : at_i;
    }
    for (size_t k = 0; k < s->terms; k++) {
        double *t = work->basis + k * QUERIES;
        const double *one = t - (k > 0) * QUERIES, *two = one - (k > 1) * QUERIES;
        for (size_t i = 0; i < lanes; i++) {
            t[i] = k == 0 ? 1 : k == 1 ? x[i] : 2 * x[i] * one[i] - two[i];
            work->basis_real[k * QUERIES + i] = (real)t[i];
        }
    }
}

static void series_lse(const double *l, size_t terms, const double *basis, size_t count,
                       double out[QUERIES])
{
    memset(out, 0, count * sizeof *out);
    for (size_t k = 0; k < terms; k++)
        for (size_t i = 0; i < count; i++)
            out[i] += l[k] * basis[k * QUERIES + i];
}

#endif
