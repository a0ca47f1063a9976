/* Rank-1 attention in linear time. A template: see real.h.
 *
 * The series of F and L (series_real.h) stand for the keys; their number of terms grows until the
 * last quarter of them is below the tolerance.
 *
 * Causal: keys come in chunks. A query takes the series of the keys before its chunk, and its own
 * chunk exactly; the two are merged as in flash attention. */
#ifndef FOLDPRUNE_NODES_REAL_H
#define FOLDPRUNE_NODES_REAL_H

#include "series_real.h"

/* ---- evaluation at the nodes ---- */

/* Largest |v| among every step-th visible key. */
static double largest_value(const keys *ks, size_t m, size_t step)
{
    double most = 0;
    for (size_t j = 0; j < m; j += step) {
        if (ks->hidden && signbit(ks->hidden[j]))
            continue;
        for (size_t i = 0; i < ks->dim; i++) {
            double x = fabs((double)ks->v[j * ks->v_row + i]);
            most = x > most ? x : most;
        }
    }
    return most;
}

/* What errors are relative to: a thousand keys tell well enough, and never too much. */
static double size_of_values(const keys *ks, size_t m)
{
    double size = largest_value(ks, m, m / 1024 + 1);
    if (size == 0)
        size = largest_value(ks, m, 1);
    return size > 0 ? size : 1;
}

static void begin_nodes(const series *s, rows group[GROUPS], size_t dim, node_work *w)
{
    for (size_t t = 0; t < s->terms; t++)
        w->q[t] = (real)node(s, w, t);
    for (size_t g = 0; g * QUERIES < s->terms; g++)
        group[g] = rows_new(&w->arrays[g], w->q + g * QUERIES, w->sums + g * QUERIES * dim,
                            least(QUERIES, s->terms - g * QUERIES), dim);
}

/* F at the nodes into w->values, L into lse and, at the nodes before their rounding to `real`, into
 * w->dot: F changes by less than its own rounding, L with its large linear part would not. Returns
 * 0 where no key was visible. */
static int node_values(const series *s, rows group[GROUPS], size_t dim, double *lse, node_work *w)
{
    for (size_t g = 0; g * QUERIES < s->terms; g++) {
        for (size_t i = 0; i < group[g].count; i++) {
            size_t t = g * QUERIES + i;
            const real *from = group[g].out + i * dim;
            real *to = w->values + t * dim, factor = (real)(1 / group[g].sum[i]);
            if (!group[g].seen[i])
                return 0;
            lse[t] = row_lse(&group[g], i, 1);
            w->dot[t] = lse[t] + (node(s, w, t) - (double)w->q[t]) * (double)group[g].reference[i];
            for (size_t j = 0; j < dim; j++)
                to[j] = from[j] * factor;
        }
    }
    return 1;
}

/* The series of all prefixes with s->terms terms. Stops at one that is not good to tol and returns
 * how many terms might do, else 0. tol 0: not to be checked. Prefixes without a visible key have L
 * = -inf. */
static size_t build(const fp_attention_call *c, const keys *ks, series *s, double tol,
                    scratch *work, node_work *w)
{
    rows group[GROUPS];
    size_t terms = s->terms, dim = ks->dim;
    double size = size_of_values(ks, c->a->m);
    fill_tables(terms, 0, &w->tables);
    begin_nodes(s, group, dim, w);
    for (size_t i = 0, begin = 0; i < s->count; i++) {
        size_t end = (s->first + i) * s->chunk;
        double *l = s->l + i * terms, *lse = s->lse + i * terms;
        real *f = s->f + i * terms * dim;
        for (size_t g = 0; g * QUERIES < terms; g++)
            absorb(c->kernels, &group[g], ks, begin, end, (ptrdiff_t)end, 0, NULL, work);
        begin = end;
        if (!node_values(s, group, dim, lse, w)) {
            memset(f, 0, terms * dim * sizeof *f);
            for (size_t t = 0; t < terms; t++)
                l[t] = lse[t] = -INFINITY;
            continue;
        }
        values_series(terms, dim, 0, w, f);
        lse_series(w->dot, terms, 0, w, l);
        size_t needed = tol > 0 ? terms_needed(f, l, terms, dim, tol, size) : 0;
        if (needed)
            return needed;
    }
    return 0;
}

/* Range of the scaled queries of a group and of the visible keys; 0 if one is not finite. */
static int ranges(const fp_attention *a, const keys *ks, size_t batch, size_t kv_head, double q[2],
                  double k[2])
{
    size_t group = a->heads / a->kv_heads;
    const real scale = (real)a->scale;
    q[0] = k[0] = INFINITY;
    q[1] = k[1] = -INFINITY;
    for (size_t h = 0; h < group; h++) {
        for (size_t i = 0; i < a->n; i++) {
            double x = scale * *at(&a->q, batch, kv_head * group + h, i);
            if (!isfinite(x))
                return 0;
            q[0] = x < q[0] ? x : q[0];
            q[1] = x > q[1] ? x : q[1];
        }
    }
    for (size_t j = 0; j < a->m; j++) {
        double x = ks->k[j * ks->k_row];
        if (ks->hidden && signbit(ks->hidden[j]))
            continue;
        if (!isfinite(x))
            return 0;
        k[0] = x < k[0] ? x : k[0];
        k[1] = x > k[1] ? x : k[1];
    }
    return q[0] <= q[1] && k[0] <= k[1];
}

/* Whether nodes take less time than all pairs of queries and keys would. Measured in pairs, each an
 * exponential and a row of V: a head with 32 nodes breaks even at about 200 queries and keys, a
 * causal one at 500, which is the constant part and the factor. */
static int worth_it(const fp_attention *a, const series *s)
{
    double queries = (double)a->n * (double)(a->heads / a->kv_heads), m = (double)a->m;
    double unseen = a->causal ? 0.5 * (double)least(a->n, a->m) : 0;
    double pairs = queries * (m - unseen);
    double own = a->causal ? 0.5 * (double)s->chunk : 0;
    return pairs > 1e4 + 2 * ((double)s->terms * m + queries * ((double)s->terms + own));
}

/* The range of a, with a margin: at its ends the derivative of p terms has p^2 times their
 * rounding, a little inside about 4 p times. A single query needs a range, too. */
static void set_range(series *s, const double q[2], const double k[2])
{
    s->middle = 0.5 * (q[0] + q[1]);
    s->half = 1.04 * 0.5 * (q[1] - q[0]);
    double wide = k[1] > k[0] ? 1 / (k[1] - k[0]) : 1;
    if (s->half < wide)
        s->half = wide;
}

/* In float32 rounding leaves about 1e-6 of the last terms. */
static double lowest_tol(double tol)
{
    return FP_REAL_DOUBLE || tol > 1e-6 ? tol : 1e-6;
}

/* Chooses the number of nodes and builds the series; s->terms = 0 if none does or is worth it. */
static void choose(const fp_attention_call *c, const keys *ks, size_t batch, size_t kv_head,
                   series *s, scratch *work, node_work *w)
{
    const fp_attention *a = c->a;
    double q[2], k[2], tol = lowest_tol(a->tol);
    s->terms = 0;
    if (!ranges(a, ks, batch, kv_head, q, k))
        return;
    set_range(s, q, k);
    /* half as many could miss a feature; smooth distributions of keys need about this many */
    double fewest = s->half * (k[1] - k[0]);
    size_t terms = fewest < MOST_TERMS ? (size_t)fewest / NODES_STEP * NODES_STEP + NODES_STEP
                                       : MOST_TERMS + 1;
    while (terms && terms <= MOST_TERMS) {
        s->terms = terms;
        place_prefixes(a, terms, s);
        if (a->method == FP_ATTENTION_AUTO && !worth_it(a, s))
            break;
        terms = build(c, ks, s, tol, work, w);
        if (!terms)
            return;
    }
    s->terms = 0;
}

/* ---- forward ---- */

/* Which prefix a tile takes (s->count if none), and how many keys it has. */
static size_t prefix_of(const fp_attention *a, const series *s, tile t, size_t *keys_before)
{
    size_t index = 0;
    *keys_before = a->m;
    if (a->causal) {
        size_t chunk = t.limit > 0 ? (size_t)(t.limit - 1) / s->chunk : 0;
        *keys_before = chunk * s->chunk;
        index = chunk < s->first ? s->count : chunk - s->first;
    }
    return index < s->count && s->lse[index * s->terms] > -INFINITY ? index : s->count;
}

static void nodes_tile(const fp_attention_call *c, const keys *ks, const series *s, size_t batch,
                       size_t head, tile t, scratch *work)
{
    const fp_attention *a = c->a;
    size_t dim = ks->dim, before, prefix = prefix_of(a, s, t, &before);
    double x[QUERIES], lse[QUERIES];
    row_arrays arrays;
    rows r = rows_new(&arrays, work->q, work->out, t.count, dim);
    load_queries(a, batch, head, t.query, t.count, work->q);
    for (size_t i = 0; i < t.count; i++)
        lse[i] = -INFINITY;
    memset(work->series, 0, t.count * dim * sizeof *work->series);
    if (prefix < s->count) {
        fill_basis(s, t.count, x, work);
        series_lse(s->l + prefix * s->terms, s->terms, work->basis, t.count, lse);
        if (dim)
            multiply('T', 'N', t.count, dim, s->terms, work->basis_real, QUERIES,
                     s->f + prefix * s->terms * dim, dim, 0, work->series, dim);
    }
    absorb(c->kernels, &r, ks, before, a->m, t.limit, t.step, NULL, work);
    for (size_t i = 0; i < t.count; i++) {
        real *out = at(&c->out, batch, head, t.query + i);
        const real *own = work->out + i * dim, *prior = work->series + i * dim;
        double own_lse = row_lse(&r, i, 1), top = own_lse > lse[i] ? own_lse : lse[i];
        double own_part = r.seen[i] ? exp(own_lse - top) : 0;
        double prior_part = lse[i] > -INFINITY ? exp(lse[i] - top) : 0;
        double total = own_part + prior_part;
        real own_weight = r.seen[i] ? (real)(own_part / total / r.sum[i]) : 0;
        real prior_weight = total > 0 ? (real)(prior_part / total) : 0;
        for (size_t j = 0; j < dim; j++)
            out[j] = own_weight * own[j] + prior_weight * prior[j];
        c->lse[(batch * a->heads + head) * a->n + t.query + i] =
            total > 0 ? top + log(total) : -INFINITY;
    }
}

/* ---- backward ---- */

/* What series receive: gradients of F's terms, and of L's the negative. */
typedef struct received {
    real *f;   /* terms x dim, for each prefix */
    double *l; /* terms */
} received;

/* A tile's share of its prefix. With w_i = exp(L(a_i) - lse_i), the part of the prefix in query i,
 * F's terms receive w_i dout_i and L's -w_i dout_i . out_i; da_i is by the series' derivatives, as
 * E[b v] = F' + F L' and E[b] = L'. Gradients are loaded. */
static void prefix_gradients(const fp_attention_call *c, const series *s, size_t prefix,
                             size_t batch, size_t head, tile t, received to, double da[QUERIES],
                             scratch *work)
{
    const fp_attention *a = c->a;
    size_t dim = a->value_dim, terms = s->terms;
    const double *l = s->l + prefix * terms, *basis = work->basis;
    double x[QUERIES], lse[QUERIES], dot[QUERIES] = {0};
    fill_basis(s, t.count, x, work);
    series_lse(l, terms, basis, t.count, lse);
    for (size_t i = 0; i < t.count; i++) {
        double weight = exp(lse[i] - c->lse[(batch * a->heads + head) * a->n + t.query + i]);
        const real *dout = at(&c->dout, batch, head, t.query + i);
        const real *out = at(&c->out, batch, head, t.query + i);
        for (size_t j = 0; j < dim; j++) {
            dot[i] += (double)dout[j] * (double)out[j];
            work->series[i * dim + j] = (real)(weight * dout[j]);
        }
        dot[i] *= weight;
    }
    memset(work->inner, 0, terms * QUERIES * sizeof *work->inner);
    if (dim) {
        multiply('N', 'N', terms, dim, t.count, work->basis_real, QUERIES, work->series, dim, 1,
                 to.f, dim);
        multiply('N', 'T', terms, t.count, dim, s->f + prefix * terms * dim, dim, work->series, dim,
                 0, work->inner, QUERIES);
    }
    double value[QUERIES] = {0}, slope[QUERIES] = {0}, l_slope[QUERIES] = {0};
    double u[QUERIES], u_before[QUERIES] = {0}; /* T_k' = k U_(k-1) */
    for (size_t i = 0; i < t.count; i++)
        u[i] = 1;
    for (size_t k = 0; k < terms; k++) {
        double sum = 0;
        for (size_t i = 0; i < t.count; i++)
            sum += basis[k * QUERIES + i] * dot[i];
        to.l[k] += sum;
        for (size_t i = 0; i < t.count; i++) {
            double inner = work->inner[k * QUERIES + i];
            double derivative = (double)k * u_before[i], next = 2 * x[i] * u[i] - u_before[i];
            value[i] += basis[k * QUERIES + i] * inner;
            slope[i] += derivative * inner;
            l_slope[i] += derivative * l[k];
            u_before[i] = u[i];
            u[i] = next;
        }
    }
    for (size_t i = 0; i < t.count; i++)
        da[i] = (slope[i] + l_slope[i] * (value[i] - dot[i])) / s->half;
}

/* Gradients of a tile's queries, and of the keys and values that it sees exactly. */
static void nodes_tile_backward(const fp_attention_call *c, const keys *ks, const series *s,
                                size_t batch, size_t head, tile t, received *to, scratch *work)
{
    const fp_attention *a = c->a;
    size_t before, prefix = prefix_of(a, s, t, &before);
    size_t kv_head = head / (a->heads / a->kv_heads);
    double da[QUERIES] = {0};
    gradients g;
    load_queries(a, batch, head, t.query, t.count, work->q);
    if (prefix < s->count)
        prefix_gradients(c, s, prefix, batch, head, t, *to, da, work);
    load_gradients(c, batch, head, t, &g, work);
    spread(c->kernels, &g, ks, before, a->m, t.limit, t.step, at(&c->dk, batch, kv_head, 0),
           (size_t)c->dk.row, at(&c->dv, batch, kv_head, 0), (size_t)c->dv.row, NULL, work);
    for (size_t i = 0; i < t.count; i++)
        *at(&c->dq, batch, head, t.query + i) = (real)(a->scale * (da[i] + (double)work->dq[i]));
}

/* From what the series received to their keys and values: backward over the prefixes, at the nodes.
 * Prefix i holds the keys of all before it, so what node t passes on to a key is exp(a_t b) times a
 * sum over later prefixes, carried along relative to exp(L_i(a_t)) so that nothing overflows. */
static void keys_from_series(const fp_attention_call *c, const keys *ks, const series *s,
                             size_t batch, size_t kv_head, received parts, scratch *work,
                             node_work *w)
{
    size_t terms = s->terms, dim = ks->dim;
    gradients g;
    memset(w->carry, 0, terms * dim * sizeof *w->carry);
    memset(w->dot, 0, terms * sizeof *w->dot);
    fill_tables(terms, 0, &w->tables);
    for (size_t t = 0; t < terms; t++)
        w->q[t] = (real)node(s, w, t);
    for (size_t i = s->count; i-- && s->lse[i * terms] > -INFINITY;) {
        size_t end = (s->first + i) * s->chunk, begin = i ? end - s->chunk : 0;
        const double *lse = s->lse + i * terms;
        for (size_t t = 0; t < terms; t++) {
            double less = i + 1 < s->count ? exp(lse[t] - lse[terms + t]) : 0, sum = 0;
            scale_row(w->carry + t * dim, dim, (real)less);
            for (size_t k = 0; k < terms; k++)
                sum += w->tables.to_series[k * terms + t] * parts.l[i * terms + k];
            w->dot[t] = w->dot[t] * less + sum;
        }
        if (dim)
            multiply('T', 'N', terms, dim, terms, w->tables.to_series_real, terms,
                     parts.f + i * terms * dim, dim, 1, w->carry, dim);
        for (size_t first = 0; first < terms; first += QUERIES) {
            g.q = w->q + first;
            g.dout = work->out;
            g.dq = work->dq; /* the nodes' own gradient is of no use */
            g.count = least(QUERIES, terms - first);
            memset(work->dq, 0, g.count * sizeof *work->dq);
            for (size_t r = 0; r < g.count; r++) {
                double weight;
                size_t t = first + r;
                g.reference[r] = split_lse(lse[t], &w->q[t], 1, &weight);
                g.dot[r] = (real)(weight * w->dot[t]);
                for (size_t j = 0; j < dim; j++)
                    work->out[r * dim + j] = (real)(weight * w->carry[t * dim + j]);
            }
            spread(c->kernels, &g, ks, begin, end, (ptrdiff_t)end, 0, at(&c->dk, batch, kv_head, 0),
                   (size_t)c->dk.row, at(&c->dv, batch, kv_head, 0), (size_t)c->dv.row, NULL, work);
        }
    }
}

#endif
