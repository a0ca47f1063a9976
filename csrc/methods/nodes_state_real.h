/* The state that rank-1 decoding keeps instead of keys and values. A template: see real.h. */
#ifndef FOLDPRUNE_NODES_STATE_REAL_H
#define FOLDPRUNE_NODES_STATE_REAL_H

#include "attention_run.h"

typedef struct state_run {
    const fp_nodes_call *call;
    real *hidden;   /* batch x m, or NULL */
    double *ranges; /* batch x kv_heads x 2: of the keys, new ones included */
    fp_status *status;
    scratch *scratch;
    node_work *node_work;
    real *f; /* a worker's series */
    double *l;
    node_tables tables;
    real *lagrange; /* a worker's, QUERIES x MOST_TERMS */
} state_run;

static size_t lay_out_state(state_run *r, const fp_attention *a, int threads, char *base)
{
    size_t used = 0, workers = (size_t)threads;
    run sizes = {.a = a, .forward = 1, .with_nodes = 1};
    r->hidden = fp_take(base, &used, a->key_mask ? a->batch * a->m : 0, sizeof(real));
    if (!a->key_mask)
        r->hidden = NULL;
    r->ranges = fp_take(base, &used, 2 * heads_of(a), sizeof(double));
    r->status = fp_take(base, &used, heads_of(a), sizeof(fp_status));
    r->f = fp_take(base, &used, workers * MOST_TERMS * a->value_dim, sizeof(real));
    r->l = fp_take(base, &used, workers * MOST_TERMS, sizeof(double));
    r->lagrange = fp_take(base, &used, workers * QUERIES * MOST_TERMS, sizeof(real));
    used = take_tables(base, used, MOST_TERMS, &r->tables);
    r->scratch = fp_take(base, &used, workers, sizeof(scratch));
    r->node_work = fp_take(base, &used, workers, sizeof(node_work));
    for (size_t i = 0; i < workers; i++) {
        scratch s;
        node_work w;
        used = take_scratch(&sizes, base, used, base ? &r->scratch[i] : &s);
        node_work *to = base ? &r->node_work[i] : &w;
        used = take_node_work(&sizes, base, used, to);
        to->tables = r->tables;
    }
    return used;
}

size_t FP_REAL(fp_nodes_work)(const fp_attention *a, int threads)
{
    state_run r;
    return lay_out_state(&r, a, threads, NULL);
}

/* The nodes stay where they are whatever keys come in. */
static series series_of_state(const fp_nodes_state *state, size_t head)
{
    series s = {.terms = state->nodes, .middle = 0.5 * (state->low[head] + state->high[head])};
    s.half = 0.5 * (state->high[head] - state->low[head]);
    if (!(s.half > 0)) /* a single query */
        s.half = 1e-3 + 1e-3 * fabs(s.middle);
    return s;
}

/* ---- append ---- */

static void check_head(void *context, size_t head, int worker)
{
    state_run *r = context;
    const fp_attention *a = r->call->a;
    const fp_nodes_state *state = r->call->state;
    keys ks = keys_of(a, head / a->kv_heads, head % a->kv_heads, r->hidden);
    series s = series_of_state(state, head);
    double *range = r->ranges + 2 * head;
    (void)worker;
    r->status[head] = FP_OK;
    range[0] = state->key_range[2 * head];
    range[1] = state->key_range[2 * head + 1];
    for (size_t j = 0; j < a->m; j++) {
        double x = ks.k[j * ks.k_row];
        int finite = isfinite(x);
        if (ks.hidden && signbit(ks.hidden[j]))
            continue;
        for (size_t i = 0; i < ks.dim; i++)
            finite &= isfinite(ks.v[j * ks.v_row + i]) != 0;
        if (!finite)
            r->status[head] = FP_ERR_VALUE;
        range[0] = x < range[0] ? x : range[0];
        range[1] = x > range[1] ? x : range[1];
    }
    if (!r->status[head] && range[0] <= range[1] &&
        !(0.5 * s.half * (range[1] - range[0]) <= (double)state->nodes))
        r->status[head] = FP_ERR_RANGE;
}

/* Adds the softmax of new keys at node t, which has a query there, to the state's. In float64:
 * rounding to float32 at every token would add up. */
static void merge_row(const fp_nodes_state *state, size_t t, const rows *r, size_t i, size_t dim)
{
    double a = r->q[i], reference = r->reference[i], old = state->reference[t];
    double added = 1, kept = 0;
    if (state->sum[t] > 0) {
        if (a >= 0 ? old > reference : old < reference) {
            added = exp(a * (reference - old));
            reference = old;
        }
        kept = exp(a * (old - reference));
    }
    state->reference[t] = reference;
    state->sum[t] = kept * state->sum[t] + added * r->sum[i];
    for (size_t j = 0; j < dim; j++)
        state->out[t * dim + j] = kept * state->out[t * dim + j] + added * r->out[i * dim + j];
}

static void append_head(void *context, size_t head, int worker)
{
    state_run *r = context;
    const fp_attention *a = r->call->a;
    const fp_nodes_state *state = r->call->state;
    keys ks = keys_of(a, head / a->kv_heads, head % a->kv_heads, r->hidden);
    series s = series_of_state(state, head);
    rows group[GROUPS];
    begin_nodes(&s, group, ks.dim, &r->node_work[worker]);
    for (size_t g = 0; g * QUERIES < s.terms; g++) {
        absorb(r->call->kernels, &group[g], &ks, 0, a->m, (ptrdiff_t)a->m, 0, NULL,
               &r->scratch[worker]);
        for (size_t i = 0; i < group[g].count; i++)
            if (group[g].seen[i])
                merge_row(state, head * s.terms + g * QUERIES + i, &group[g], i, ks.dim);
    }
    memcpy(state->key_range + 2 * head, r->ranges + 2 * head, 2 * sizeof(double));
    double size = largest_value(&ks, a->m, 1);
    if (size > state->size[head])
        state->size[head] = size;
}

static fp_status worst_status(const state_run *r, size_t heads)
{
    fp_status worst = FP_OK;
    for (size_t i = 0; i < heads; i++)
        worst = r->status[i] > worst ? r->status[i] : worst;
    return worst;
}

fp_status FP_REAL(fp_nodes_append)(fp_nodes_call *c)
{
    const fp_attention *a = c->a;
    state_run r = {.call = c};
    lay_out_state(&r, a, c->threads, c->work);
    for (size_t i = 0; r.hidden && i < a->batch * a->m; i++)
        r.hidden[i] = a->key_mask[i] ? (real)1 : (real)-1;
    fp_parallel_for(heads_of(a), c->threads, check_head, &r);
    fp_status status = worst_status(&r, heads_of(a));
    if (status)
        return status;
    fill_unit(c->state->nodes, &r.tables);
    fp_parallel_for(heads_of(a), c->threads, append_head, &r);
    return FP_OK;
}

/* ---- attend ---- */

/* F at the nodes, and L before the nodes' rounding; 0 where no key was visible. */
static int state_values(const fp_nodes_state *state, const series *s, size_t head, size_t dim,
                        node_work *w)
{
    for (size_t t = 0; t < s->terms; t++) {
        size_t at_state = head * s->terms + t;
        double sum = state->sum[at_state];
        if (!(sum > 0))
            return 0;
        double inverse = 1 / sum;
        w->dot[t] = node(s, w, t) * state->reference[at_state] + log(sum);
        for (size_t j = 0; j < dim; j++)
            w->values[t * dim + j] = (real)(state->out[at_state * dim + j] * inverse);
    }
    return 1;
}

/* Lagrange's polynomials at x, by the barycentric formula: for a few queries that takes less than
 * the series would. */
static void lagrange_at(double x, size_t terms, const double *unit, real *to)
{
    double parts[MOST_TERMS], sum = 0;
    for (size_t t = 0; t < terms; t++) {
        double halved = t == 0 || t == terms - 1 ? 0.5 : 1.0, away = x - unit[t];
        if (away == 0) {
            memset(to, 0, terms * sizeof *to);
            to[t] = 1;
            return;
        }
        sum += parts[t] = (t % 2 ? -halved : halved) / away;
    }
    for (size_t t = 0; t < terms; t++)
        to[t] = (real)(parts[t] / sum);
}

static void attend_queries(const fp_nodes_call *c, const series *s, size_t batch, size_t head,
                           real *lagrange, const node_work *w)
{
    const fp_attention *a = c->a;
    const real scale = (real)a->scale;
    size_t dim = a->value_dim, terms = s->terms;
    for (size_t first = 0; first < a->n && dim; first += QUERIES) {
        size_t count = least(QUERIES, a->n - first);
        for (size_t i = 0; i < count; i++) {
            double x = scale * *at(&a->q, batch, head, first + i);
            lagrange_at((x - s->middle) / s->half, terms, w->tables.unit, lagrange + i * terms);
        }
        multiply('N', 'N', count, dim, terms, lagrange, terms, w->values, dim, 0,
                 at(&c->out, batch, head, first), (size_t)c->out.row);
    }
}

/* Whether the nodes do: of the series only the last quarter is formed; if not, how many might. */
static size_t nodes_needed(const fp_nodes_call *c, size_t head, real *f, double *l, node_work *w)
{
    size_t terms = c->state->nodes, dim = c->a->value_dim, quarter = terms / 4;
    double tol = lowest_tol(c->a->tol), size = c->state->size[head];
    size = size > 0 ? size : 1;
    values_series(terms, dim, terms - quarter, w, f);
    lse_series(w->dot, terms, terms - quarter, w, l);
    if (part_of_series(f, l, dim, terms - quarter, terms, size) <= tol)
        return 0;
    values_series(terms, dim, terms - 2 * quarter, w, f);
    lse_series(w->dot, terms, terms - 2 * quarter, w, l);
    return terms_needed(f, l, terms, dim, tol, size);
}

static int queries_in_range(const fp_attention *a, size_t batch, size_t head, double low,
                            double high)
{
    const real scale = (real)a->scale;
    for (size_t i = 0; i < a->n; i++) {
        double x = scale * *at(&a->q, batch, head, i);
        if (!(x >= low && x <= high)) /* NaN too */
            return 0;
    }
    return 1;
}

static void attend_head(void *context, size_t head, int worker)
{
    state_run *r = context;
    const fp_nodes_call *c = r->call;
    const fp_attention *a = c->a;
    node_work *w = &r->node_work[worker];
    size_t dim = a->value_dim, group = a->heads / a->kv_heads, batch = head / a->kv_heads;
    size_t first = head % a->kv_heads * group;
    series s = series_of_state(c->state, head);
    real *f = r->f + (size_t)worker * MOST_TERMS * dim;
    double *l = r->l + (size_t)worker * MOST_TERMS;
    r->status[head] = FP_OK;
    c->needed[head] = 0;
    for (size_t h = first; h < first + group; h++)
        if (!queries_in_range(a, batch, h, c->state->low[head], c->state->high[head]))
            r->status[head] = FP_ERR_RANGE;
    if (!state_values(c->state, &s, head, dim, w)) { /* no key yet */
        memset(w->values, 0, s.terms * dim * sizeof *w->values);
    } else {
        c->needed[head] = (int32_t)nodes_needed(c, head, f, l, w);
        if (c->needed[head])
            r->status[head] = FP_ERR_RANGE;
    }
    if (r->status[head])
        return;
    for (size_t h = first; h < first + group; h++)
        attend_queries(c, &s, batch, h, r->lagrange + (size_t)worker * QUERIES * MOST_TERMS, w);
}

fp_status FP_REAL(fp_nodes_attend)(fp_nodes_call *c)
{
    state_run r = {.call = c};
    lay_out_state(&r, c->a, c->threads, c->work);
    fill_tables(c->state->nodes, c->state->nodes / 2, &r.tables);
    fp_parallel_for(heads_of(c->a), c->threads, attend_head, &r);
    return worst_status(&r, heads_of(c->a));
}

#endif
