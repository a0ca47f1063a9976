#include "fold.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "matrix.h"
#include "work.h"

static const double ONE = 1.0, ZERO = 0.0;

static int32_t max32(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

static int32_t min32(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static void raise_to(int32_t *largest, double wanted)
{
    *largest = max32(*largest, (int32_t)wanted);
}

/* Largest workspace of the LAPACK calls below, by LAPACK's own queries. */
static int32_t query_lapack(const fp_fold_dims *m)
{
    int32_t query = -1, info, largest = 1, rank;
    double size, dummy = 0;
    int32_t idummy = 0;
    fp_dgeqrf(&m->N, &m->h, &dummy, &m->N, &dummy, &size, &query, &info);
    raise_to(&largest, size);
    fp_dgeqp3(&m->h, &m->d, &dummy, &m->h, &idummy, &dummy, &size, &query, &info);
    raise_to(&largest, size);
    int32_t one = 1, reflectors = min32(m->h, m->d);
    fp_dormqr("L", "T", &m->h, &one, &reflectors, &dummy, &m->h, &dummy, &dummy, &m->h, &size,
              &query, &info, 1, 1);
    raise_to(&largest, size);
    fp_dgesdd("S", &m->h, &m->d, &dummy, &m->h, &dummy, &dummy, &m->h, &dummy, &reflectors, &size,
              &query, &idummy, &info, 1);
    raise_to(&largest, size);
    /* truncated factors are decomposed too, in any smaller shape: LAPACK's bound for those */
    raise_to(&largest, 4.0 * m->h * m->h + 8.0 * m->h + m->d);
    int32_t most = max32(m->h, m->d), targets = m->h + 1;
    fp_dgelsd(&most, &m->h, &targets, &dummy, &most, &dummy, &most, &dummy, &ZERO, &rank, &size,
              &query, &idummy, &info);
    raise_to(&largest, size);
    return largest;
}

static fp_status plan_dims(const fp_heads *h, fp_fold_dims *m)
{
    if (!h || !h->heads || !h->groups || !h->head_dim || h->heads % h->groups)
        return FP_ERR_ARGUMENT;
    size_t n = h->left.cols + (h->left_bias.data != NULL);
    size_t de = h->right.cols + (h->right_extra.data != NULL);
    size_t per_group = h->heads / h->groups, largest = INT32_MAX / 4;
    if (!h->left.cols || !h->right.cols || h->head_dim > largest || n > largest / per_group ||
        de > largest || h->head_dim > largest / (de > n * per_group ? de : n * per_group))
        return FP_ERR_OVERFLOW;
    *m = (fp_fold_dims){.per_group = per_group,
                        .h = (int32_t)h->head_dim,
                        .n = (int32_t)n,
                        .N = (int32_t)(n * per_group),
                        .d = (int32_t)h->right.cols,
                        .de = (int32_t)de};
    m->k = min32(m->N, m->h);
    m->lapack_work = query_lapack(m);
    return FP_OK;
}

static int all_positive(const double *scale, size_t n)
{
    for (size_t j = 0; scale && j < n; j++)
        if (!(scale[j] > 0) || isinf(scale[j]))
            return 0;
    return 1;
}

static double row_norm(const double *factor, size_t n, size_t row)
{
    double sum = 0;
    for (size_t j = 0; j < n; j++)
        sum += factor[row * n + j] * factor[row * n + j];
    return sqrt(sum);
}

static int rows_positive(const double *factor, size_t n)
{
    for (size_t i = 0; factor && i < n; i++) {
        double norm = row_norm(factor, n, i);
        if (!(norm > 0) || isinf(norm))
            return 0;
    }
    return 1;
}

static fp_status check_heads(const fp_heads *h)
{
    const fp_matrix *views[] = {&h->left, &h->right};
    for (int i = 0; i < 2; i++) {
        fp_status status = fp_matrix_check(views[i]);
        if (status)
            return status;
    }
    if (h->left.rows != h->heads * h->head_dim || h->right.rows != h->groups * h->head_dim)
        return FP_ERR_SHAPE;
    if (h->left_bias.data && (h->left_bias.rows != h->left.rows || h->left_bias.cols != 1))
        return FP_ERR_SHAPE;
    if (h->right_extra.data && (h->right_extra.rows != h->right.rows || h->right_extra.cols != 1))
        return FP_ERR_SHAPE;
    size_t n = h->left.cols + (h->left_bias.data != NULL);
    if (!all_positive(h->left_scale, h->left.cols) ||
        !all_positive(h->right_scale, h->right.cols) || !rows_positive(h->left_factor, n) ||
        !rows_positive(h->right_factor, h->right.cols))
        return FP_ERR_RANGE;
    return FP_OK;
}

static fp_fold_buffers lay_out(const fp_fold_dims *m, char *base, size_t *bytes)
{
    size_t h = (size_t)m->h, N = (size_t)m->N, d = (size_t)m->d, de = (size_t)m->de, used = 0;
    size_t item = sizeof(double), most = h > d ? h : d;
    fp_fold_buffers w;
    w.left = fp_take(base, &used, h * N, item);
    w.right = fp_take(base, &used, h * de, item);
    w.qr = fp_take(base, &used, h * N, item);
    w.r_left = fp_take(base, &used, h * h, item);
    w.seen = fp_take(base, &used, h * d, item);
    w.x = fp_take(base, &used, h * de, item);
    w.white = fp_take(base, &used, h * d, item);
    w.y = fp_take(base, &used, h * de, item);
    w.rest = fp_take(base, &used, h * d, item);
    w.u = fp_take(base, &used, h * h, item);
    w.vt = fp_take(base, &used, h * d, item);
    w.s = fp_take(base, &used, h, item);
    w.tau = fp_take(base, &used, most, item);
    w.basis = fp_take(base, &used, h * h, item);
    w.mix = fp_take(base, &used, h * h, item);
    w.fitted = fp_take(base, &used, h * h, item);
    w.panel = fp_take(base, &used, most * h, item);
    w.target = fp_take(base, &used, most * (h + 1), item);
    w.lapack = fp_take(base, &used, (size_t)m->lapack_work, item);
    w.pivots = fp_take(base, &used, d, sizeof(int32_t));
    /* dgesdd wants 8 min(rows, cols), dgelsd at most min x (3 log2(min) + 11) */
    w.ints = fp_take(base, &used, h * 128, sizeof(int32_t));
    *bytes = used;
    return w;
}

size_t fp_fold_work(const fp_heads *h, int threads)
{
    fp_fold_dims m;
    size_t bytes;
    if (plan_dims(h, &m))
        return 0;
    lay_out(&m, NULL, &bytes);
    return (size_t)fp_clamp_threads(threads) * bytes + h->right.cols * sizeof(double) +
           h->groups * sizeof(fp_status);
}

fp_status fp_fold_run(fp_fold_call *call, fp_task task, int threads, void *work, size_t work_bytes)
{
    const fp_heads *h = call->heads;
    fp_status status = plan_dims(h, &call->dims);
    if (!status)
        status = check_heads(h);
    if (status)
        return status;
    threads = fp_clamp_threads(threads);
    if (!work || work_bytes < fp_fold_work(h, threads))
        return FP_ERR_ARGUMENT;
    lay_out(&call->dims, NULL, &call->stride);
    call->buffers = work;
    double *norms = (double *)(void *)((char *)work + (size_t)threads * call->stride);
    call->status = (fp_status *)(void *)(norms + h->right.cols);
    call->scale = h->right_factor ? norms : h->right_scale;
    for (size_t j = 0; h->right_factor && j < h->right.cols; j++)
        norms[j] = row_norm(h->right_factor, h->right.cols, j);
    fp_parallel_for(h->groups, threads, task, call);
    for (size_t j = 0; j < h->groups; j++)
        if (call->status[j])
            return call->status[j];
    return FP_OK;
}

fp_fold_buffers fp_fold_worker(const fp_fold_call *call, int worker)
{
    size_t bytes;
    return lay_out(&call->dims, call->buffers + (size_t)worker * call->stride, &bytes);
}

/* qr = the group's left times its weighting; row-major h x N is column-major N x h. */
static void weigh_left(const fp_fold_call *call, fp_fold_buffers *w)
{
    const fp_heads *heads = call->heads;
    const fp_fold_dims *m = &call->dims;
    size_t n = (size_t)m->n;
    if (heads->left_factor) {
        for (size_t i = 0; i < m->per_group; i++)
            fp_dgemm("N", "N", &m->n, &m->h, &m->n, &ONE, heads->left_factor, &m->n,
                     w->left + i * n, &m->N, &ZERO, w->qr + i * n, &m->N, 1, 1);
        return;
    }
    memcpy(w->qr, w->left, heads->head_dim * (size_t)m->N * sizeof(double));
    for (size_t i = 0; heads->left_scale && i < heads->head_dim * m->per_group; i++)
        for (size_t j = 0; j < heads->left.cols; j++)
            w->qr[i * n + j] *= heads->left_scale[j];
}

/* seen and white, from right and x. */
static void weigh_right(const fp_fold_call *call, fp_fold_buffers *w)
{
    const fp_fold_dims *m = &call->dims;
    const double *factor = call->heads->right_factor;
    if (factor) {
        fp_dgemm("N", "N", &m->d, &m->h, &m->d, &ONE, factor, &m->d, w->right, &m->de, &ZERO,
                 w->seen, &m->d, 1, 1);
        fp_dgemm("N", "T", &m->k, &m->d, &m->h, &ONE, w->r_left, &m->k, w->seen, &m->d, &ZERO,
                 w->white, &m->k, 1, 1);
        return;
    }
    for (int32_t i = 0; i < m->h; i++)
        for (int32_t j = 0; j < m->d; j++)
            w->seen[(size_t)i * (size_t)m->d + (size_t)j] =
                w->right[(size_t)i * (size_t)m->de + (size_t)j] * fp_fold_right_scale(call, j);
    w->white = w->x;
}

double fp_fold_energy(const double *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sum;
}

fp_status fp_fold_load(const fp_fold_call *call, size_t group, fp_fold_buffers *w, double *energy)
{
    const fp_heads *heads = call->heads;
    const fp_fold_dims *m = &call->dims;
    size_t h = heads->head_dim, N = (size_t)m->N, de = (size_t)m->de;
    for (size_t i = 0; i < m->per_group; i++) {
        size_t row = (group * m->per_group + i) * h, offset = i * (size_t)m->n;
        fp_matrix_load(&heads->left, row, h, w->left + offset, N, 1);
        if (heads->left_bias.data)
            fp_matrix_load(&heads->left_bias, row, h, w->left + offset + heads->left.cols, N, 1);
    }
    fp_matrix_load(&heads->right, group * h, h, w->right, de, 1);
    if (heads->right_extra.data)
        fp_matrix_load(&heads->right_extra, group * h, h, w->right + m->d, de, 1);

    weigh_left(call, w);
    int32_t info;
    fp_dgeqrf(&m->N, &m->h, w->qr, &m->N, w->tau, w->lapack, &m->lapack_work, &info);
    if (info)
        return FP_ERR_LAPACK;
    for (int32_t c = 0; c < m->h; c++)
        for (int32_t r = 0; r < m->k; r++)
            w->r_left[r + c * m->k] = r <= c ? w->qr[r + (size_t)c * N] : 0.0;
    fp_dgemm("N", "T", &m->k, &m->de, &m->h, &ONE, w->r_left, &m->k, w->right, &m->de, &ZERO, w->x,
             &m->k, 1, 1);
    for (int32_t j = 0; j < m->d; j++) {
        double scale = fp_fold_right_scale(call, j), *column = w->x + (size_t)j * (size_t)m->k;
        for (int32_t i = 0; i < m->k; i++)
            column[i] *= scale;
    }
    weigh_right(call, w);
    *energy = fp_fold_energy(w->white, (size_t)m->k * (size_t)m->d);
    return isfinite(*energy) ? FP_OK : FP_ERR_LAPACK;
}

fp_status fp_fold_svd(const fp_fold_dims *m, int32_t rows, int32_t cols, fp_fold_buffers *w)
{
    int32_t info, least = min32(rows, cols);
    fp_dgesdd("S", &rows, &cols, w->y, &rows, w->s, w->u, &rows, w->vt, &least, w->lapack,
              &m->lapack_work, w->ints, &info, 1);
    return info ? FP_ERR_LAPACK : FP_OK;
}

double fp_fold_noise(const fp_fold_dims *m)
{
    return 8.0 * DBL_EPSILON * (double)max32(max32(m->N, m->d), m->h);
}

int32_t fp_fold_numerical_rank(const fp_fold_dims *m, const double *s, int32_t n, int32_t stride,
                               double largest)
{
    double noise = fp_fold_noise(m) * fabs(largest);
    int32_t rank = 0;
    while (rank < n && fabs(s[(size_t)rank * (size_t)stride]) > noise)
        rank++;
    return rank;
}

fp_status fp_fold_gauge(const fp_fold_dims *m, int32_t rows, int32_t extra, fp_fold_buffers *w,
                        int32_t *rank)
{
    int32_t info, reflectors = min32(rows, m->d);
    memset(w->pivots, 0, (size_t)m->d * sizeof *w->pivots); /* every column is free to move */
    fp_dgeqp3(&rows, &m->d, w->y, &rows, w->pivots, w->tau, w->lapack, &m->lapack_work, &info);
    if (info)
        return FP_ERR_LAPACK;
    double *carried = w->y + (size_t)rows * (size_t)m->d;
    if (extra)
        fp_dormqr("L", "T", &rows, &extra, &reflectors, w->y, &rows, w->tau, carried, &rows,
                  w->lapack, &m->lapack_work, &info, 1, 1);
    if (info)
        return FP_ERR_LAPACK;
    for (int32_t j = 0; j < m->d; j++)
        w->pivots[j]--; /* LAPACK counts from 1 */
    *rank = fp_fold_numerical_rank(m, w->y, reflectors, rows + 1, w->y[0]);
    int32_t cols = m->d - *rank + extra;
    if (*rank && cols)
        fp_dtrsm("L", "U", "N", "N", rank, &cols, &ONE, w->y, &rows,
                 w->y + (size_t)rows * (size_t)*rank, &rows, 1, 1, 1, 1);
    return FP_OK;
}

double fp_fold_right_scale(const fp_fold_call *call, int32_t column)
{
    return call->scale ? call->scale[column] : 1.0;
}

void fp_fold_clear(const fp_fold_call *call, size_t group)
{
    const fp_fold_dims *m = &call->dims;
    fp_fold_out *out = call->out;
    size_t left = m->per_group * out->capacity * (size_t)m->n;
    memset(out->left + group * left, 0, left * sizeof(double));
    size_t right = out->capacity * (size_t)m->de;
    memset(out->right + group * right, 0, right * sizeof(double));
    for (size_t i = 0; out->pivots && i < out->capacity; i++)
        out->pivots[group * out->capacity + i] = -1;
}

void fp_fold_write_gauge(const fp_fold_call *call, size_t group, const fp_fold_buffers *w,
                         int32_t rows, int32_t rank)
{
    const fp_fold_dims *m = &call->dims;
    size_t capacity = call->out->capacity, de = (size_t)m->de;
    double *right = call->out->right + group * capacity * de;
    for (int32_t i = 0; i < rank; i++) {
        double *row = right + (size_t)i * de;
        const double *source = w->y + i;
        call->out->pivots[group * capacity + (size_t)i] = w->pivots[i];
        /* the identity holds between scaled columns: take the scales out again */
        double own = fp_fold_right_scale(call, w->pivots[i]);
        row[w->pivots[i]] = 1.0;
        for (int32_t j = rank; j < m->d; j++)
            row[w->pivots[j]] =
                source[(size_t)j * (size_t)rows] * own / fp_fold_right_scale(call, w->pivots[j]);
        for (int32_t j = m->d; j < m->de; j++)
            row[j] = source[(size_t)j * (size_t)rows] * own;
    }
}

void fp_fold_pick_columns(const fp_fold_dims *m, const fp_fold_buffers *w, const int32_t *pivots,
                          int32_t rank)
{
    for (int32_t j = 0; j < rank; j++)
        for (int32_t i = 0; i < m->h; i++)
            w->basis[i + (size_t)j * (size_t)m->h] =
                w->right[(size_t)i * (size_t)m->de + (size_t)pivots[j]];
}

void fp_fold_project(const fp_fold_call *call, size_t group, const fp_fold_buffers *w, int32_t rank)
{
    const fp_fold_dims *m = &call->dims;
    size_t size = call->out->capacity * (size_t)m->n;
    double *left = call->out->left + group * m->per_group * size;
    for (size_t i = 0; rank && i < m->per_group; i++)
        fp_dgemm("N", "N", &m->n, &rank, &m->h, &ONE, w->left + i * (size_t)m->n, &m->N, w->basis,
                 &m->h, &ZERO, left + i * size, &m->n, 1, 1);
}
