/* Diagonal weight compression: the value projection becomes a choice of coordinates. */
#include <math.h>
#include <string.h>

#include "fold.h"

static const double ONE = 1.0, ZERO = 0.0, MINUS = -1.0;
static const int32_t SINGLE = 1;

/* ---- which columns */

static void sort(int32_t *columns, int32_t count)
{
    for (int32_t i = 1; i < count; i++) /* insertion sort: at most head_dim of them */
        for (int32_t j = i; j && columns[j - 1] > columns[j]; j--) {
            int32_t swap = columns[j];
            columns[j] = columns[j - 1];
            columns[j - 1] = swap;
        }
}

/* The `count` columns of X of largest norm; ties: the first. */
static int32_t top_columns(const fp_fold_dims *m, fp_fold_buffers *w, int32_t count,
                           int32_t *columns)
{
    double *norms = w->tau; /* max(h, d) doubles; the QR that used it is done */
    for (int32_t j = 0; j < m->d; j++)
        norms[j] = fp_fold_energy(w->x + (size_t)j * (size_t)m->k, (size_t)m->k);
    for (int32_t i = 0; i < count; i++) {
        int32_t best = 0;
        for (int32_t j = 1; j < m->d; j++)
            if (norms[j] > norms[best])
                best = j;
        norms[best] = -1.0; /* taken */
        columns[i] = best;
    }
    return count;
}

/* At most `count` columns, each the one that lowers the error of X F most beside those before it:
 * forward selection by a pivoted Cholesky factorisation of C = F F^T, which X C follows. */
static int32_t forward_columns(const fp_fold_call *call, fp_fold_buffers *w, double energy,
                               int32_t count, int32_t *columns)
{
    const fp_fold_dims *m = &call->dims;
    const double *factor = call->heads->right_factor;
    size_t d = (size_t)m->d, k = (size_t)m->k;
    double *left = w->tau, *covariance = w->y, noise = fp_fold_noise(m);
    fp_dgemm("N", "N", &m->k, &m->d, &m->d, &ONE, w->white, &m->k, factor, &m->d, &ZERO, covariance,
             &m->k, 1, 1);
    for (size_t j = 0; j < d; j++) /* variance that the chosen columns do not explain */
        left[j] = call->scale[j] * call->scale[j];
    for (int32_t taken = 0; taken < count; taken++) {
        int32_t best = -1;
        double largest = noise * noise * energy;
        for (int32_t j = 0; j < m->d; j++) {
            if (left[j] <= noise * call->scale[j] * call->scale[j])
                continue;
            double gain = fp_fold_energy(covariance + (size_t)j * k, k) / left[j];
            if (gain > largest) {
                largest = gain;
                best = j;
            }
        }
        if (best < 0)
            return taken;
        double *column = w->panel + (size_t)taken * d, root = sqrt(left[best]);
        fp_dgemm("T", "N", &m->d, &SINGLE, &m->d, &ONE, factor, &m->d, factor + (size_t)best * d,
                 &m->d, &ZERO, column, &m->d, 1, 1);
        for (int32_t t = 0; t < taken; t++) {
            const double *before = w->panel + (size_t)t * d;
            double own = before[best];
            for (size_t j = 0; j < d; j++)
                column[j] -= own * before[j];
        }
        for (size_t j = 0; j < d; j++) {
            column[j] /= root;
            left[j] -= column[j] * column[j];
        }
        left[best] = 0.0;
        for (size_t i = 0; i < k; i++)
            w->s[i] = covariance[(size_t)best * k + i] / root;
        fp_dgemm("N", "N", &m->k, &m->d, &SINGLE, &MINUS, w->s, &m->k, column, &SINGLE, &ONE,
                 covariance, &m->k, 1, 1);
        columns[taken] = best;
    }
    return count;
}

static int32_t choose_columns(const fp_fold_call *call, fp_fold_buffers *w, double energy,
                              int32_t count, int32_t *columns)
{
    int32_t chosen = call->heads->right_factor ? forward_columns(call, w, energy, count, columns)
                                               : top_columns(&call->dims, w, count, columns);
    sort(columns, chosen);
    return chosen;
}

/* ---- least squares */

/* panel = the chosen rows of right_factor, each a column of d. */
static void load_chosen(const fp_fold_call *call, fp_fold_buffers *w, const int32_t *columns,
                        int32_t chosen)
{
    size_t d = (size_t)call->dims.d;
    for (int32_t t = 0; t < chosen; t++)
        memcpy(w->panel + (size_t)t * d, call->heads->right_factor + (size_t)columns[t] * d,
               d * sizeof(double));
}

/* Fits `count` weighted rows (row-major, d columns) by what the chosen columns meet: coefficients
 * (count x chosen). */
static fp_status fit(const fp_fold_call *call, fp_fold_buffers *w, const double *rows,
                     int32_t count, const int32_t *columns, int32_t chosen, double *coefficients)
{
    const fp_fold_dims *m = &call->dims;
    size_t d = (size_t)m->d;
    int32_t rank, info = 0;
    double machine = -1.0;
    if (!chosen || !count)
        return FP_OK;
    if (call->heads->right_factor) {
        load_chosen(call, w, columns, chosen);
        memcpy(w->target, rows, (size_t)count * d * sizeof(double));
        fp_dgelsd(&m->d, &chosen, &count, w->panel, &m->d, w->target, &m->d, w->s, &machine, &rank,
                  w->lapack, &m->lapack_work, w->ints, &info);
    }
    for (int32_t t = 0; t < chosen; t++)
        for (int32_t i = 0; i < count; i++)
            coefficients[i + (size_t)t * (size_t)count] =
                call->heads->right_factor ? w->target[(size_t)i * d + (size_t)t]
                                          /* columns that tell nothing of each other */
                                          : rows[(size_t)i * d + (size_t)columns[t]] /
                                                fp_fold_right_scale(call, columns[t]);
    return info ? FP_ERR_LAPACK : FP_OK;
}

/* basis = the fit of right by the chosen columns; y = R_left times what it leaves, weighted (k x
 * d); rest the same without R_left. */
static fp_status fit_right(const fp_fold_call *call, fp_fold_buffers *w, const int32_t *columns,
                           int32_t chosen)
{
    const fp_fold_dims *m = &call->dims;
    size_t h = (size_t)m->h, d = (size_t)m->d;
    fp_status status = fit(call, w, w->seen, m->h, columns, chosen, w->basis);
    if (status)
        return status;
    memcpy(w->rest, w->seen, h * d * sizeof(double));
    if (chosen && call->heads->right_factor) {
        load_chosen(call, w, columns, chosen);
        fp_dgemm("N", "T", &m->d, &m->h, &chosen, &MINUS, w->panel, &m->d, w->basis, &m->h, &ONE,
                 w->rest, &m->d, 1, 1);
    } else {
        for (int32_t t = 0; t < chosen; t++)
            for (size_t i = 0; i < h; i++)
                w->rest[i * d + (size_t)columns[t]] = 0.0;
    }
    fp_dgemm("N", "T", &m->k, &m->d, &m->h, &ONE, w->r_left, &m->k, w->rest, &m->d, &ZERO, w->y,
             &m->k, 1, 1);
    return FP_OK;
}

/* Least squares (R_left basis) z = [U's first `count` columns, the extra column if there is one]:
 * z in w->target, its leading dimension returned. */
static fp_status solve_basis(const fp_fold_call *call, fp_fold_buffers *w, int32_t rank,
                             int32_t count, size_t *leading)
{
    const fp_fold_dims *m = &call->dims;
    int32_t targets = count, numerical, info, rows = m->k > rank ? m->k : rank;
    double machine = -1.0;
    size_t k = (size_t)m->k;
    *leading = (size_t)rows;
    memset(w->target, 0, (size_t)(count + 1) * *leading * sizeof(double));
    for (size_t j = 0; j < (size_t)count; j++)
        memcpy(w->target + j * *leading, w->u + j * k, k * sizeof(double));
    if (m->de > m->d)
        memcpy(w->target + (size_t)targets++ * *leading, w->x + (size_t)m->d * k,
               k * sizeof(double));
    if (!targets || !rank)
        return FP_OK;
    fp_dgemm("N", "N", &m->k, &rank, &m->h, &ONE, w->r_left, &m->k, w->basis, &m->h, &ZERO,
             w->panel, &m->k, 1, 1);
    fp_dgelsd(&m->k, &rank, &targets, w->panel, &m->k, w->target, &rows, w->s, &machine, &numerical,
              w->lapack, &m->lapack_work, w->ints, &info);
    return info ? FP_ERR_LAPACK : FP_OK;
}

/* Identity in the columns, the extra column from solve_basis's target `count`, left from basis. */
static void write_fold(const fp_fold_call *call, size_t group, const fp_fold_buffers *w,
                       const int32_t *columns, int32_t rank, int32_t count, size_t leading)
{
    const fp_fold_dims *m = &call->dims;
    fp_fold_out *out = call->out;
    for (int32_t i = 0; i < rank; i++) {
        size_t row = group * out->capacity + (size_t)i;
        out->pivots[row] = columns[i];
        out->right[row * (size_t)m->de + (size_t)columns[i]] = 1.0;
        if (m->de > m->d)
            out->right[row * (size_t)m->de + (size_t)m->d] =
                w->target[(size_t)count * leading + (size_t)i];
    }
    out->ranks[group] = rank;
    fp_fold_project(call, group, w, rank);
}

/* ---- a choice of columns alone */

static void select_group(void *context, size_t group, int worker)
{
    fp_fold_call *call = context;
    const fp_fold_dims *m = &call->dims;
    fp_fold_out *out = call->out;
    fp_fold_buffers w = fp_fold_worker(call, worker);
    int32_t count = (int32_t)out->capacity;
    size_t leading;
    double energy;
    fp_status status = fp_fold_load(call, group, &w, &energy);
    fp_fold_clear(call, group);
    if (status)
        goto done;
    if (call->columns)
        memcpy(w.pivots, call->columns + group * out->capacity, out->capacity * sizeof *w.pivots);
    else
        count = choose_columns(call, &w, energy, count, w.pivots);
    status = fit_right(call, &w, w.pivots, count);
    if (status)
        goto done;
    out->error[group] = fp_fold_energy(w.y, (size_t)m->k * (size_t)m->d);
    out->energy[group] = energy;
    status = solve_basis(call, &w, count, 0, &leading);
    if (!status)
        write_fold(call, group, &w, w.pivots, count, 0, leading);
done:
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

/* ---- columns and a remainder
 *
 * M' = T E_S + D B: E_S the chosen columns' identity, T and D free, B of k rows. Fitted away, T
 * leaves the part Z = U S V^T of X F that the chosen columns do not explain, whose best part of
 * rank k is B = U_k^T X. Then T is the fit of what D B leaves, and the value's rows are E_S + A B
 * with T A = D. */

/* Loads the group, chooses the columns (w->pivots), fits them and decomposes Z. `whole`: nothing
 * will be left out, so the columns had better be well conditioned than telling. */
static fp_status decompose_remainder(const fp_fold_call *call, size_t group, int whole,
                                     fp_fold_buffers *w, int32_t *rank, double *energy)
{
    const fp_fold_dims *m = &call->dims;
    fp_status status = fp_fold_load(call, group, w, energy);
    if (!status && call->heads->right_factor && !whole) {
        int32_t most = m->h < m->d ? m->h : m->d;
        *rank = choose_columns(call, w, *energy, most, w->pivots);
    } else if (!status) {
        memcpy(w->y, w->x, (size_t)m->k * (size_t)m->d * sizeof(double));
        status = fp_fold_gauge(m, m->k, 0, w, rank);
    }
    if (!status)
        status = fit_right(call, w, w->pivots, *rank);
    if (!status)
        status = fp_fold_svd(m, m->k, m->d, w);
    return status;
}

static void remainder_spectrum_group(void *context, size_t group, int worker)
{
    fp_fold_call *call = context;
    const fp_fold_dims *m = &call->dims;
    fp_fold_buffers w = fp_fold_worker(call, worker);
    int32_t rank = 0, least = m->k < m->d ? m->k : m->d;
    fp_status status = decompose_remainder(call, group, 0, &w, &rank, &call->energy[group]);
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

/* b (k x d, row-major) = B; mix (h x k) = D as left sees it; basis = T likewise. */
static fp_status fit_remainder(const fp_fold_call *call, fp_fold_buffers *w, int32_t rank,
                               int32_t k, double *b)
{
    const fp_fold_dims *m = &call->dims;
    const double *factor = call->heads->right_factor;
    int32_t least = m->k < m->d ? m->k : m->d;
    if (!k)
        return FP_OK;
    fp_dgemm("T", "N", &m->d, &k, &m->k, &ONE, w->x, &m->k, w->u, &m->k, &ZERO, b, &m->d, 1, 1);
    for (int32_t i = 0; i < k; i++) {
        double *row = b + (size_t)i * (size_t)m->d;
        for (int32_t j = 0; j < m->d; j++)
            row[j] /= fp_fold_right_scale(call, j);
        for (int32_t t = 0; t < rank; t++)
            row[w->pivots[t]] = 0.0;
    }
    if (!factor) /* the chosen columns tell nothing of the ones that B reads */
        return FP_OK;
    fp_dgemm("T", "T", &m->h, &k, &m->d, &ONE, w->rest, &m->d, w->vt, &least, &ZERO, w->mix, &m->h,
             1, 1);
    for (int32_t j = 0; j < k; j++)
        for (int32_t i = 0; i < m->h; i++)
            w->mix[i + (size_t)j * (size_t)m->h] /= w->s[j];
    double *seen = w->white, *coefficients = w->fitted;
    fp_dgemm("N", "N", &m->d, &k, &m->d, &ONE, factor, &m->d, b, &m->d, &ZERO, seen, &m->d, 1, 1);
    fp_status status = fit(call, w, seen, k, w->pivots, rank, coefficients);
    if (!status && rank)
        fp_dgemm("N", "N", &m->h, &rank, &k, &MINUS, w->mix, &m->h, coefficients, &k, &ONE,
                 w->basis, &m->h, 1, 1);
    return status;
}

static void remainder_group(void *context, size_t group, int worker)
{
    fp_fold_call *call = context;
    const fp_fold_dims *m = &call->dims;
    fp_fold_out *out = call->out;
    fp_fold_buffers w = fp_fold_worker(call, worker);
    int32_t rank = 0, k = call->ranks[group], least = m->k < m->d ? m->k : m->d;
    size_t h = (size_t)m->h, d = (size_t)m->d, leading;
    double energy, *a = call->a + group * out->capacity * h, *b = call->b + group * h * d;
    fp_fold_clear(call, group);
    memset(a, 0, out->capacity * h * sizeof(double));
    memset(b, 0, h * d * sizeof(double));
    fp_status status = decompose_remainder(call, group, k == m->h, &w, &rank, &energy);
    if (status)
        goto done;
    int32_t most = fp_fold_numerical_rank(m, w.s, least, 1, sqrt(energy));
    k = k < most ? k : most;
    out->energy[group] = energy;
    out->error[group] = 0;
    for (int32_t i = k; i < least; i++)
        out->error[group] += w.s[i] * w.s[i];
    status = fit_remainder(call, &w, rank, k, b);
    if (!status)
        status = solve_basis(call, &w, rank, k, &leading);
    if (status)
        goto done;
    for (int32_t i = 0; i < rank; i++)
        for (int32_t j = 0; j < k; j++)
            a[(size_t)i * h + (size_t)j] = w.target[(size_t)j * leading + (size_t)i];
    write_fold(call, group, &w, w.pivots, rank, k, leading);
done:
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
