/* The two calls of attention: workspace, and who does what. A template: see real.h.
 *
 * Forward: each key/value head's series, then all tiles of queries. Backward: exact heads by slices
 * of their keys; the others by series, tiles of queries, keys. */
#ifndef FOLDPRUNE_ATTENTION_RUN_H
#define FOLDPRUNE_ATTENTION_RUN_H

#include "nodes_real.h"

enum { PARTS = 8 }; /* of the queries where they share one series, at most */

typedef struct run {
    const fp_attention_call *call;
    const fp_attention *a;
    fp_tiling tiling;
    size_t slices, parts, capacity; /* parts: tasks per key/value head that tiles are dealt to */
    int forward, with_nodes;
    real *hidden; /* batch x m, or NULL */
    series *series;
    real *f, *received_f;
    double *l, *lse, *received_l;
    real *dq; /* batch x heads x slices x n x rank */
    scratch *scratch;
    node_work *node_work;
} run;

static size_t heads_of(const fp_attention *a)
{
    return a->batch * a->kv_heads;
}

static size_t take_scratch(const run *r, char *base, size_t used, scratch *s)
{
    size_t rank = r->a->rank, dim = r->a->value_dim, tile = QUERIES * KEYS;
    size_t basis = r->with_nodes ? MOST_TERMS * QUERIES : 0;
    s->p = fp_take(base, &used, tile, sizeof(real));
    s->dp = fp_take(base, &used, r->forward ? 0 : tile, sizeof(real));
    s->b = fp_take(base, &used, KEYS, sizeof(real));
    s->low = fp_take(base, &used, KEYS, sizeof(real));
    s->high = fp_take(base, &used, KEYS, sizeof(real));
    s->q = fp_take(base, &used, QUERIES * rank, sizeof(real));
    s->dq = fp_take(base, &used, QUERIES * rank, sizeof(real));
    s->out = fp_take(base, &used, QUERIES * dim, sizeof(real));
    s->series = fp_take(base, &used, basis ? QUERIES * dim : 0, sizeof(real));
    s->basis = fp_take(base, &used, basis, sizeof(double));
    s->basis_real = fp_take(base, &used, basis, sizeof(real));
    s->inner = fp_take(base, &used, r->forward ? 0 : basis, sizeof(real));
    return used;
}

static size_t take_tables(char *base, size_t used, size_t terms, node_tables *tables)
{
    tables->unit = fp_take(base, &used, terms, sizeof(double));
    tables->to_series = fp_take(base, &used, terms * terms, sizeof(double));
    tables->to_series_real = fp_take(base, &used, terms * terms, sizeof(real));
    return used;
}

/* All but the tables. */
static size_t take_node_work(const run *r, char *base, size_t used, node_work *w)
{
    size_t dim = r->a->value_dim;
    w->q = fp_take(base, &used, MOST_TERMS, sizeof(real));
    w->sums = fp_take(base, &used, MOST_TERMS * dim, sizeof(real));
    w->values = fp_take(base, &used, MOST_TERMS * dim, sizeof(real));
    w->carry = fp_take(base, &used, r->forward ? 0 : MOST_TERMS * dim, sizeof(real));
    w->dot = fp_take(base, &used, MOST_TERMS, sizeof(double));
    w->arrays = fp_take(base, &used, GROUPS, sizeof(row_arrays));
    return used;
}

/* Lays the workspace out, or with base NULL only returns its size. */
static size_t lay_out(run *r, int threads, char *base)
{
    const fp_attention *a = r->a;
    size_t used = 0, heads = heads_of(a), workers = (size_t)threads;
    r->tiling = fp_tiling_of(a);
    r->slices = fp_slices_of(a);
    r->with_nodes = fp_may_have_nodes(a);
    r->capacity = r->with_nodes ? terms_capacity(a) : 0;
    r->parts = a->causal ? (a->m ? (a->m - 1) / chunk_of(NODES_STEP) + 1 : 1)
                         : least(PARTS, r->tiling.count);
    r->hidden = fp_take(base, &used, a->key_mask ? a->batch * a->m : 0, sizeof(real));
    if (!a->key_mask)
        r->hidden = NULL;
    r->series = fp_take(base, &used, heads, sizeof(series));
    size_t terms = heads * r->capacity;
    r->f = fp_take(base, &used, terms * a->value_dim, sizeof(real));
    r->l = fp_take(base, &used, terms, sizeof(double));
    r->lse = fp_take(base, &used, terms, sizeof(double));
    if (!r->forward) {
        size_t received = r->with_nodes ? heads * (r->capacity + PARTS * MOST_TERMS) : 0;
        r->received_f = fp_take(base, &used, received * a->value_dim, sizeof(real));
        r->received_l = fp_take(base, &used, received, sizeof(double));
        r->dq =
            fp_take(base, &used, a->batch * a->heads * r->slices * a->n * a->rank, sizeof(real));
    }
    r->scratch = fp_take(base, &used, workers, sizeof(scratch));
    r->node_work = fp_take(base, &used, workers, sizeof(node_work));
    for (size_t i = 0; i < workers; i++) {
        scratch s;
        node_work w;
        used = take_scratch(r, base, used, base ? &r->scratch[i] : &s);
        if (r->with_nodes) {
            node_work *to = base ? &r->node_work[i] : &w;
            used = take_tables(base, used, MOST_TERMS, &to->tables);
            used = take_node_work(r, base, used, to);
        }
    }
    return used;
}

static run begin_run(const fp_attention_call *c, int forward)
{
    const fp_attention *a = c->a;
    run r = {.call = c, .a = a, .forward = forward};
    lay_out(&r, c->threads, c->work);
    for (size_t i = 0; r.hidden && i < a->batch * a->m; i++)
        r.hidden[i] = a->key_mask[i] ? (real)1 : (real)-1;
    for (size_t i = 0; i < heads_of(a); i++) {
        r.series[i].terms = 0;
        r.series[i].f = r.f + i * r.capacity * a->value_dim;
        r.series[i].l = r.l + i * r.capacity;
        r.series[i].lse = r.lse + i * r.capacity;
    }
    return r;
}

/* ---- forward ---- */

static void choose_head(void *context, size_t item, int worker)
{
    run *r = context;
    size_t batch = item / r->a->kv_heads, kv_head = item % r->a->kv_heads;
    keys ks = keys_of(r->a, batch, kv_head, r->hidden);
    choose(r->call, &ks, batch, kv_head, &r->series[item], &r->scratch[worker],
           &r->node_work[worker]);
    r->call->nodes[item] = (int32_t)r->series[item].terms;
}

static void attend_tile(void *context, size_t item, int worker)
{
    run *r = context;
    const fp_attention *a = r->a;
    tile t = tile_at(a, &r->tiling, item % r->tiling.count);
    size_t head = item / r->tiling.count % a->heads, batch = item / r->tiling.count / a->heads;
    size_t kv_head = head / (a->heads / a->kv_heads);
    keys ks = keys_of(a, batch, kv_head, r->hidden);
    const series *s = &r->series[batch * a->kv_heads + kv_head];
    if (s->terms)
        nodes_tile(r->call, &ks, s, batch, head, t, &r->scratch[worker]);
    else
        exact_tile(r->call, &ks, batch, head, t, &r->scratch[worker]);
}

size_t FP_REAL(fp_attention_work)(const fp_attention *a, int threads)
{
    run r = {.a = a, .forward = 1};
    return lay_out(&r, threads, NULL);
}

void FP_REAL(fp_attention_forward)(fp_attention_call *c)
{
    const fp_attention *a = c->a;
    run r = begin_run(c, 1);
    memset(c->nodes, 0, heads_of(a) * sizeof *c->nodes);
    if (r.with_nodes)
        fp_parallel_for(heads_of(a), c->threads, choose_head, &r);
    fp_parallel_for(a->batch * a->heads * r.tiling.count, c->threads, attend_tile, &r);
}

/* ---- backward ---- */

static received received_by(const run *r, size_t head, size_t part)
{
    size_t terms = r->series[head].terms, first = head * (r->capacity + PARTS * MOST_TERMS);
    return (received){r->received_f + (first + part * terms) * r->a->value_dim,
                      r->received_l + first + part * terms};
}

/* The forward pass's series once more: its terms were found to do. */
static void rebuild_head(void *context, size_t item, int worker)
{
    run *r = context;
    const fp_attention *a = r->a;
    size_t batch = item / a->kv_heads, kv_head = item % a->kv_heads;
    series *s = &r->series[item];
    keys ks = keys_of(a, batch, kv_head, r->hidden);
    double q[2], k[2];
    for (size_t j = 0; j < a->m; j++) {
        memset(at(&r->call->dk, batch, kv_head, j), 0, a->rank * sizeof(real));
        memset(at(&r->call->dv, batch, kv_head, j), 0, a->value_dim * sizeof(real));
    }
    s->terms = (size_t)r->call->nodes[item];
    if (!s->terms)
        return;
    ranges(a, &ks, batch, kv_head, q, k);
    set_range(s, q, k);
    place_prefixes(a, s->terms, s);
    build(r->call, &ks, s, 0, &r->scratch[worker], &r->node_work[worker]);
}

static void exact_part(void *context, size_t item, int worker)
{
    run *r = context;
    const fp_attention *a = r->a;
    size_t head = item / r->slices, slice = item % r->slices;
    size_t batch = head / a->kv_heads, kv_head = head % a->kv_heads;
    size_t group = a->heads / a->kv_heads, tiles = a->m / KEYS + 1;
    if (r->series[head].terms)
        return;
    keys ks = keys_of(a, batch, kv_head, r->hidden);
    exact_slice(r->call, &ks, batch, kv_head, least(a->m, tiles * slice / r->slices * KEYS),
                least(a->m, tiles * (slice + 1) / r->slices * KEYS),
                r->dq + item * group * a->n * a->rank, &r->scratch[worker]);
}

static void sum_slices(void *context, size_t head, int worker)
{
    run *r = context;
    const fp_attention *a = r->a;
    size_t group = a->heads / a->kv_heads, size = group * a->n * a->rank;
    const real *from = r->dq + head * r->slices * size, scale = (real)a->scale;
    (void)worker;
    if (r->series[head].terms)
        return;
    for (size_t h = 0; h < group; h++) {
        for (size_t i = 0; i < a->n; i++) {
            real *to = at(&r->call->dq, head / a->kv_heads, head % a->kv_heads * group + h, i);
            for (size_t c = 0; c < a->rank; c++) {
                real sum = 0;
                for (size_t slice = 0; slice < r->slices; slice++)
                    sum += from[slice * size + (h * a->n + i) * a->rank + c];
                to[c] = scale * sum;
            }
        }
    }
}

/* Tiles of queries whose own keys are chunk `part`, or if not causal, the part's share. */
static void tiles_of_part(const run *r, const series *s, size_t part, size_t *begin, size_t *end)
{
    const fp_tiling *t = &r->tiling;
    if (!r->a->causal) {
        *begin = t->count * part / r->parts;
        *end = t->count * (part + 1) / r->parts;
        return;
    }
    size_t blind = (size_t)(1 - t->limit), from = (part * s->chunk + blind) / QUERIES;
    size_t to = from + s->chunk / QUERIES;
    *begin = part == 0 || from < t->first ? 0 : least(from - t->first, t->count);
    *end = to < t->first ? 0 : least(to - t->first, t->count);
}

static void nodes_part(void *context, size_t item, int worker)
{
    run *r = context;
    const fp_attention *a = r->a;
    size_t head = item / r->parts, part = item % r->parts, begin, end;
    size_t batch = head / a->kv_heads, kv_head = head % a->kv_heads;
    size_t group = a->heads / a->kv_heads;
    const series *s = &r->series[head];
    if (!s->terms)
        return;
    keys ks = keys_of(a, batch, kv_head, r->hidden);
    received to = {NULL, NULL};
    if (!a->causal || (part >= s->first && part - s->first < s->count)) {
        to = received_by(r, head, a->causal ? part - s->first : part);
        memset(to.f, 0, s->terms * a->value_dim * sizeof *to.f);
        memset(to.l, 0, s->terms * sizeof *to.l);
    }
    tiles_of_part(r, s, part, &begin, &end);
    for (size_t h = kv_head * group; h < (kv_head + 1) * group; h++)
        for (size_t i = begin; i < end; i++)
            nodes_tile_backward(r->call, &ks, s, batch, h, tile_at(a, &r->tiling, i), &to,
                                &r->scratch[worker]);
}

static void nodes_keys(void *context, size_t head, int worker)
{
    run *r = context;
    const fp_attention *a = r->a;
    size_t batch = head / a->kv_heads, kv_head = head % a->kv_heads;
    const series *s = &r->series[head];
    if (!s->terms)
        return;
    keys ks = keys_of(a, batch, kv_head, r->hidden);
    received first = received_by(r, head, 0);
    for (size_t part = 1; !a->causal && part < r->parts; part++) {
        received other = received_by(r, head, part);
        for (size_t i = 0; i < s->terms * a->value_dim; i++)
            first.f[i] += other.f[i];
        for (size_t i = 0; i < s->terms; i++)
            first.l[i] += other.l[i];
    }
    keys_from_series(r->call, &ks, s, batch, kv_head, first, &r->scratch[worker],
                     &r->node_work[worker]);
}

size_t FP_REAL(fp_attention_backward_work)(const fp_attention *a, int threads)
{
    run r = {.a = a};
    return lay_out(&r, threads, NULL);
}

void FP_REAL(fp_attention_backward)(fp_attention_call *c)
{
    run r = begin_run(c, 0);
    size_t heads = heads_of(c->a);
    int exact = 0;
    for (size_t i = 0; i < heads; i++)
        exact |= !c->nodes[i];
    fp_parallel_for(heads, c->threads, rebuild_head, &r);
    if (exact) {
        fp_parallel_for(heads * r.slices, c->threads, exact_part, &r);
        fp_parallel_for(heads, c->threads, sum_slices, &r);
    }
    if (r.with_nodes) {
        fp_parallel_for(heads * r.parts, c->threads, nodes_part, &r);
        fp_parallel_for(heads, c->threads, nodes_keys, &r);
    }
}

#endif
