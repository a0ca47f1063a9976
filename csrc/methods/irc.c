/* Identical row compression: low-rank and lossless folds of query and key. */
#include <math.h>
#include <string.h>

#include "fold.h"

static const double ONE = 1.0, ZERO = 0.0;

static void spectrum_group(void *context, size_t group, int worker)
{
    fp_fold_call *call = context;
    const fp_fold_dims *m = &call->dims;
    fp_fold_buffers w = fp_fold_worker(call, worker);
    double energy;
    fp_status status = fp_fold_load(call, group, &w, &energy);
    if (!status) {
        memcpy(w.y, w.white, (size_t)m->k * (size_t)m->d * sizeof(double));
        status = fp_fold_svd(m, m->k, m->d, &w);
    }
    int32_t least = m->k < m->d ? m->k : m->d;
    for (int32_t i = 0; !status && i < m->h; i++)
        call->squared[group * (size_t)m->h + (size_t)i] = i < least ? w.s[i] * w.s[i] : 0.0;
    call->status[group] = status;
}

fp_status fp_irc_spectrum(const fp_heads *h, double *squared, int threads, void *work,
                          size_t work_bytes)
{
    if (!squared)
        return FP_ERR_ARGUMENT;
    fp_fold_call call = {.heads = h, .squared = squared};
    return fp_fold_run(&call, spectrum_group, threads, work, work_bytes);
}

/* Best rank-r part of X F = U S V^T, F the weighting of right. M_r = left^T (R F V_r) (S_r^-1 U_r^T
 * X): no inverse of F. Leaves R F V_r (h x r) in mix and U_r^T X (r x d; columns scaled as X's) in
 * y. */
static fp_status truncate(const fp_fold_call *call, fp_fold_buffers *w, int32_t wanted,
                          int32_t *rank, double *error)
{
    const fp_fold_dims *m = &call->dims;
    int32_t least = m->k < m->d ? m->k : m->d;
    memcpy(w->y, w->white, (size_t)m->k * (size_t)m->d * sizeof(double));
    fp_status status = fp_fold_svd(m, m->k, m->d, w);
    if (status)
        return status;
    *rank = fp_fold_numerical_rank(m, w->s, least, 1, w->s[0]);
    if (*rank > wanted)
        *rank = wanted;
    *error = 0;
    for (int32_t i = *rank; i < least; i++)
        *error += w->s[i] * w->s[i];
    if (*rank) {
        fp_dgemm("T", "T", &m->h, rank, &m->d, &ONE, w->seen, &m->d, w->vt, &least, &ZERO, w->mix,
                 &m->h, 1, 1);
        fp_dgemm("T", "N", rank, &m->d, &m->k, &ONE, w->u, &m->k, w->x, &m->k, &ZERO, w->y, rank, 1,
                 1);
    }
    return FP_OK;
}

/* basis = mix S_r^-1 U_r^T X at the pivots. */
static void mix_at_pivots(const fp_fold_call *call, fp_fold_buffers *w, int32_t rank, int32_t kept)
{
    const fp_fold_dims *m = &call->dims;
    double *picked = w->panel, *columns = w->r_left; /* k x kept, rank x kept */
    if (!kept)
        return;
    for (int32_t j = 0; j < kept; j++) {
        double scale = fp_fold_right_scale(call, w->pivots[j]);
        const double *x = w->x + (size_t)w->pivots[j] * (size_t)m->k;
        for (int32_t i = 0; i < m->k; i++)
            picked[i + (size_t)j * (size_t)m->k] = x[i] / scale;
    }
    fp_dgemm("T", "N", &rank, &kept, &m->k, &ONE, w->u, &m->k, picked, &m->k, &ZERO, columns, &rank,
             1, 1);
    for (int32_t j = 0; j < kept; j++)
        for (int32_t i = 0; i < rank; i++)
            columns[i + (size_t)j * (size_t)rank] /= w->s[i];
    fp_dgemm("N", "N", &m->h, &kept, &rank, &ONE, w->mix, &m->h, columns, &rank, &ZERO, w->basis,
             &m->h, 1, 1);
}

static void write_balanced(const fp_fold_call *call, size_t group, fp_fold_buffers *w, int32_t rank)
{
    const fp_fold_dims *m = &call->dims;
    double *right = call->out->right + group * call->out->capacity * (size_t)m->de;
    for (int32_t i = 0; i < rank; i++) {
        double root = sqrt(w->s[i]);
        for (int32_t j = 0; j < m->d; j++)
            right[(size_t)i * (size_t)m->de + (size_t)j] =
                w->y[i + (size_t)j * (size_t)rank] / (root * fp_fold_right_scale(call, j));
        for (int32_t j = 0; j < m->h; j++)
            w->basis[j + (size_t)i * (size_t)m->h] = w->mix[j + (size_t)i * (size_t)m->h] / root;
    }
}

static void fold_group(void *context, size_t group, int worker)
{
    fp_fold_call *call = context;
    const fp_fold_dims *m = &call->dims;
    fp_fold_out *out = call->out;
    fp_fold_buffers w = fp_fold_worker(call, worker);
    int32_t rank = 0, rows = m->k;
    double error = 0, energy;
    fp_status status = fp_fold_load(call, group, &w, &energy);
    fp_fold_clear(call, group);
    if (status)
        goto done;
    if (!call->ranks && out->pivots) { /* all of M: no truncation, one rounding less */
        memcpy(w.y, w.x, (size_t)m->k * (size_t)m->de * sizeof(double));
    } else {
        status = truncate(call, &w, call->ranks ? call->ranks[group] : m->h, &rank, &error);
        rows = rank;
        if (status || !rank)
            goto done;
    }
    if (!out->pivots) {
        write_balanced(call, group, &w, rank);
    } else {
        status = fp_fold_gauge(m, rows, call->ranks ? 0 : m->de - m->d, &w, &rank);
        if (status)
            goto done;
        if (call->ranks)
            mix_at_pivots(call, &w, rows, rank);
        else
            fp_fold_pick_columns(m, &w, w.pivots, rank);
        fp_fold_write_gauge(call, group, &w, rows, rank);
    }
    fp_fold_project(call, group, &w, rank);
done:
    if (!status) {
        out->ranks[group] = rank;
        out->error[group] = error;
        out->energy[group] = energy;
    }
    call->status[group] = status;
}

fp_status fp_irc_apply(const fp_heads *h, const int32_t *ranks, fp_fold_out *out, int threads,
                       void *work, size_t work_bytes)
{
    if (!h || !out || !out->left || !out->right || !out->ranks || !out->error || !out->energy)
        return FP_ERR_ARGUMENT;
    if (h->right_extra.data && (ranks || !out->pivots))
        return FP_ERR_ARGUMENT; /* only the whole gauge carries the extra column */
    for (size_t j = 0; ranks && j < h->groups; j++)
        if (ranks[j] < 0 || (size_t)ranks[j] > h->head_dim || (size_t)ranks[j] > out->capacity)
            return FP_ERR_RANGE;
    if (!ranks && out->capacity < h->head_dim)
        return FP_ERR_RANGE;
    fp_fold_call call = {.heads = h, .ranks = ranks, .out = out};
    return fp_fold_run(&call, fold_group, threads, work, work_bytes);
}
