/* Diagonal weight compression: the value projection becomes a choice of coordinates. */
#include <string.h>

#include "fold.h"

static double column_energy(const fp_fold_dims *m, const fp_fold_buffers *w, int32_t column)
{
    const double *x = w->x + (size_t)column * (size_t)m->k;
    double sum = 0;
    for (int32_t i = 0; i < m->k; i++)
        sum += x[i] * x[i];
    return sum;
}

/* The `count` columns of X of largest norm, in ascending order of column; ties: the first. */
static void top_columns(const fp_fold_dims *m, fp_fold_buffers *w, int32_t count, int32_t *columns)
{
    double *norms = w->tau; /* max(h, d) doubles; the QR that used it is done */
    for (int32_t j = 0; j < m->d; j++)
        norms[j] = column_energy(m, w, j);
    for (int32_t i = 0; i < count; i++) {
        int32_t best = 0;
        for (int32_t j = 1; j < m->d; j++)
            if (norms[j] > norms[best])
                best = j;
        norms[best] = -1.0; /* taken */
    }
    for (int32_t j = 0, i = 0; j < m->d; j++)
        if (norms[j] < 0)
            columns[i++] = j;
}

/* Least squares X[:, S] b = X[:, extra], written to the extra column of out->right. */
static fp_status fit_extra(const fp_fold_call *call, size_t group, fp_fold_buffers *w,
                           const int32_t *columns, int32_t count)
{
    const fp_fold_dims *m = &call->dims;
    int32_t one = 1, rank, info, ldb = m->k > count ? m->k : count;
    double machine = -1.0, *target = w->mix, *a = w->y;
    for (int32_t j = 0; j < count; j++)
        memcpy(a + (size_t)j * (size_t)m->k, w->x + (size_t)columns[j] * (size_t)m->k,
               (size_t)m->k * sizeof(double));
    memset(target, 0, (size_t)ldb * sizeof(double));
    memcpy(target, w->x + (size_t)m->d * (size_t)m->k, (size_t)m->k * sizeof(double));
    fp_dgelsd(&m->k, &count, &one, a, &m->k, target, &ldb, w->s, &machine, &rank, w->lapack,
              &m->lapack_work, w->ints, &info);
    if (info)
        return FP_ERR_LAPACK;
    double *right = call->out->right + group * call->out->capacity * (size_t)m->de;
    for (int32_t i = 0; i < count; i++)
        right[(size_t)i * (size_t)m->de + (size_t)m->d] =
            target[i] * fp_fold_right_scale(call, columns[i]);
    return FP_OK;
}

static void select_group(void *context, size_t group, int worker)
{
    fp_fold_call *call = context;
    const fp_fold_dims *m = &call->dims;
    fp_fold_out *out = call->out;
    fp_fold_buffers w = fp_fold_worker(call, worker);
    int32_t count = (int32_t)out->capacity, *columns = out->pivots + group * out->capacity;
    double energy;
    fp_status status = fp_fold_load(call, group, &w, &energy);
    fp_fold_clear(call, group);
    if (status) {
        call->status[group] = status;
        return;
    }
    if (call->columns)
        memcpy(columns, call->columns + group * out->capacity, out->capacity * sizeof *columns);
    else
        top_columns(m, &w, count, columns);
    double error = energy;
    for (int32_t i = 0; i < count; i++) {
        size_t row = group * out->capacity + (size_t)i;
        out->right[row * (size_t)m->de + (size_t)columns[i]] = 1.0;
        error -= column_energy(m, &w, columns[i]);
    }
    if (m->de > m->d)
        status = fit_extra(call, group, &w, columns, count);
    fp_fold_pick_columns(m, &w, columns, count);
    fp_fold_project(call, group, &w, count);
    out->ranks[group] = count;
    out->error[group] = error > 0 ? error : 0;
    out->energy[group] = energy;
    call->status[group] = status;
}

fp_status fp_dwc_select(const fp_heads *h, const int32_t *columns, fp_fold_out *out, int threads,
                        void *work, size_t work_bytes)
{
    if (!h || !out || !out->left || !out->right || !out->pivots || !out->ranks || !out->error ||
        !out->energy)
        return FP_ERR_ARGUMENT;
    if (out->capacity < 1 || out->capacity > h->head_dim || out->capacity > h->right.cols)
        return FP_ERR_RANGE;
    for (size_t i = 0; columns && i < h->groups * out->capacity; i++)
        if (columns[i] < 0 || (size_t)columns[i] >= h->right.cols)
            return FP_ERR_RANGE;
    fp_fold_call call = {.heads = h, .columns = columns, .out = out};
    return fp_fold_run(&call, select_group, threads, work, work_bytes);
}

/* After fp_fold_gauge with R12 kept: SVD of R12, the remainder as the left factor weighs it. R11
 * goes to r11 (rank x rank). */
static fp_status decompose_remainder(const fp_fold_dims *m, fp_fold_buffers *w, int32_t rank,
                                     double *r11)
{
    int32_t cols = m->d - rank;
    size_t column = (size_t)rank * sizeof(double), ld = (size_t)m->k;
    for (int32_t j = 0; j < rank; j++)
        memcpy(r11 + (size_t)j * (size_t)rank, w->y + (size_t)j * ld, column);
    if (!rank || !cols)
        return FP_OK;
    /* R12 without the rows below it; each column moves to an address no higher than its own */
    for (int32_t j = 0; j < cols; j++)
        memmove(w->y + (size_t)j * (size_t)rank, w->y + (size_t)(rank + j) * ld, column);
    return fp_fold_svd(m, rank, cols, w);
}

static fp_status gauge(const fp_fold_dims *m, fp_fold_buffers *w, int32_t *rank)
{
    memcpy(w->y, w->x, (size_t)m->k * (size_t)m->de * sizeof(double));
    return fp_fold_gauge(m, m->k, m->de - m->d, 1, w, rank);
}

static void remainder_spectrum_group(void *context, size_t group, int worker)
{
    fp_fold_call *call = context;
    const fp_fold_dims *m = &call->dims;
    fp_fold_buffers w = fp_fold_worker(call, worker);
    int32_t rank = 0;
    fp_status status = fp_fold_load(call, group, &w, &call->energy[group]);
    if (!status)
        status = gauge(m, &w, &rank);
    if (!status)
        status = decompose_remainder(m, &w, rank, w.r_left);
    int32_t least = rank < m->d - rank ? rank : m->d - rank;
    for (int32_t i = 0; !status && i < m->h; i++)
        call->squared[group * (size_t)m->h + (size_t)i] = i < least ? w.s[i] * w.s[i] : 0.0;
    call->status[group] = status;
}

fp_status fp_dwc_spectrum(const fp_heads *h, double *squared, double *energy, int threads,
                          void *work, size_t work_bytes)
{
    if (!squared || !energy)
        return FP_ERR_ARGUMENT;
    fp_fold_call call = {.heads = h, .squared = squared, .energy = energy};
    return fp_fold_run(&call, remainder_spectrum_group, threads, work, work_bytes);
}

static void remainder_group(void *context, size_t group, int worker)
{
    fp_fold_call *call = context;
    const fp_fold_dims *m = &call->dims;
    fp_fold_out *out = call->out;
    fp_fold_buffers w = fp_fold_worker(call, worker);
    int32_t rank = 0, *pivots = out->pivots + group * out->capacity;
    size_t h = (size_t)m->h, d = (size_t)m->d;
    double energy, *a = call->a + group * out->capacity * h, *b = call->b + group * h * d;
    double *r11 = w.r_left; /* at most h x h; X, which needed it, is formed */
    fp_status status = fp_fold_load(call, group, &w, &energy);
    fp_fold_clear(call, group);
    memset(a, 0, out->capacity * h * sizeof(double));
    memset(b, 0, h * d * sizeof(double));
    if (status)
        goto done;
    status = gauge(m, &w, &rank);
    if (status)
        goto done;
    fp_fold_write_gauge(call, group, &w, m->k, rank, 0); /* identity and extra column */
    fp_fold_pick_columns(m, &w, pivots, rank);
    fp_fold_project(call, group, &w, rank);
    status = decompose_remainder(m, &w, rank, r11);
    if (status)
        goto done;

    int32_t least = rank < m->d - rank ? rank : m->d - rank, k = call->ranks[group];
    k = k < least ? k : least;
    out->error[group] = 0;
    for (int32_t i = k; i < least; i++)
        out->error[group] += w.s[i] * w.s[i];
    for (int32_t j = 0; j < k; j++)
        for (int32_t i = 0; i < rank; i++)
            w.u[i + (size_t)j * (size_t)rank] *= w.s[j];
    fp_fold_solve(rank, rank, k, r11, w.u, rank);
    for (int32_t j = 0; j < k; j++) {
        for (int32_t i = 0; i < rank; i++)
            a[(size_t)i * h + (size_t)j] =
                w.u[i + (size_t)j * (size_t)rank] * fp_fold_right_scale(call, w.pivots[i]);
        for (int32_t c = 0; c < m->d - rank; c++)
            b[(size_t)j * d + (size_t)w.pivots[rank + c]] =
                w.vt[j + (size_t)c * (size_t)least] / fp_fold_right_scale(call, w.pivots[rank + c]);
    }
done:
    if (!status) {
        out->ranks[group] = rank;
        out->energy[group] = energy;
    }
    call->status[group] = status;
}

fp_status fp_dwc_remainder(const fp_heads *h, const int32_t *remainder_ranks, fp_fold_out *out,
                           double *a, double *b, int threads, void *work, size_t work_bytes)
{
    if (!remainder_ranks)
        return fp_irc_apply(h, NULL, out, threads, work, work_bytes);
    if (!h || !out || !out->left || !out->right || !out->pivots || !out->ranks || !out->error ||
        !out->energy || !a || !b)
        return FP_ERR_ARGUMENT;
    if (out->capacity < h->head_dim)
        return FP_ERR_RANGE;
    for (size_t j = 0; j < h->groups; j++)
        if (remainder_ranks[j] < 0 || (size_t)remainder_ranks[j] > h->head_dim)
            return FP_ERR_RANGE;
    fp_fold_call call = {.heads = h, .ranks = remainder_ranks, .out = out, .a = a, .b = b};
    return fp_fold_run(&call, remainder_group, threads, work, work_bytes);
}
