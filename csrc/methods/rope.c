/* IRC under rotary position embedding. Written as complex numbers, plane p of a query and a key
 * meet as Re(conj(q_p) e^{i theta} k_p): only multiplying k_p by some c and q_p by 1 / conj(c)
 * leaves that as it is, so planes can be dropped, rotated and scaled, never mixed. */
#include <string.h>

#include "fold.h"
#include "matrix.h"

typedef struct rope_call {
    const fp_heads *heads;
    fp_rope pairing;
    double *scores;
    const int32_t *ranks;
    int32_t *planes;
    fp_fold_out *out;
} rope_call;

static size_t plane_row(const rope_call *c, size_t plane, int second)
{
    size_t half = c->heads->head_dim / 2;
    if (c->pairing == FP_ROPE_ADJACENT)
        return 2 * plane + (size_t)second;
    return plane + (second ? half : 0);
}

/* One row of a matrix, its columns scaled, and its bias column, read piece by piece. */
static double row_energy(const fp_matrix *m, const double *scale, const fp_matrix *bias, size_t row)
{
    double sum = 0, value;
    fp_matrix cell = *m;
    cell.cols = 1;
    for (size_t j = 0; j < m->cols; j++) {
        fp_matrix_load(&cell, row, 1, &value, 1, 1);
        cell.data = (const char *)cell.data + m->col_stride;
        value *= scale ? scale[j] : 1.0;
        sum += value * value;
    }
    if (bias->data) {
        fp_matrix_load(bias, row, 1, &value, 1, 1);
        sum += value * value;
    }
    return sum;
}

static void score_group(void *context, size_t group, int worker)
{
    rope_call *c = context;
    const fp_heads *h = c->heads;
    size_t per_group = h->heads / h->groups, planes = h->head_dim / 2;
    (void)worker;
    for (size_t p = 0; p < planes; p++) {
        double q = 0, k = 0;
        for (int second = 0; second < 2; second++) {
            size_t row = plane_row(c, p, second);
            for (size_t i = 0; i < per_group; i++)
                q += row_energy(&h->left, h->left_scale, &h->left_bias,
                                (group * per_group + i) * h->head_dim + row);
            k += row_energy(&h->right, h->right_scale, &h->right_extra, group * h->head_dim + row);
        }
        c->scores[group * planes + p] = q * k;
    }
}

static fp_status check(const fp_heads *h, fp_rope pairing)
{
    if (!h || !h->heads || !h->groups || !h->head_dim || h->heads % h->groups || h->head_dim % 2 ||
        (pairing != FP_ROPE_HALF && pairing != FP_ROPE_ADJACENT) || h->left_factor ||
        h->right_factor)
        return FP_ERR_ARGUMENT;
    fp_status status = fp_matrix_check(&h->left);
    if (!status)
        status = fp_matrix_check(&h->right);
    if (status)
        return status;
    if (h->left.rows != h->heads * h->head_dim || h->right.rows != h->groups * h->head_dim ||
        !h->right.cols)
        return FP_ERR_SHAPE;
    if ((h->left_bias.data && h->left_bias.rows != h->left.rows) ||
        (h->right_extra.data && h->right_extra.rows != h->right.rows))
        return FP_ERR_SHAPE;
    return FP_OK;
}

fp_status fp_rope_scores(const fp_heads *h, fp_rope pairing, double *scores, int threads)
{
    fp_status status = check(h, pairing);
    if (status || !scores)
        return status ? status : FP_ERR_ARGUMENT;
    rope_call c = {.heads = h, .pairing = pairing, .scores = scores};
    fp_parallel_for(h->groups, threads, score_group, &c);
    return FP_OK;
}

static void load_plane(const rope_call *c, const fp_matrix *m, const fp_matrix *bias, size_t head,
                       size_t plane, double *real, double *imaginary)
{
    for (int second = 0; second < 2; second++) {
        size_t row = head * c->heads->head_dim + plane_row(c, plane, second);
        double *target = second ? imaginary : real;
        fp_matrix_load(m, row, 1, target, 1, 1);
        if (bias->data)
            fp_matrix_load(bias, row, 1, target + m->cols, 1, 1);
    }
}

/* z *= (re + i im) for n complex numbers. */
static void multiply(double *real, double *imaginary, size_t n, double re, double im)
{
    for (size_t j = 0; j < n; j++) {
        double x = real[j] * re - imaginary[j] * im;
        imaginary[j] = real[j] * im + imaginary[j] * re;
        real[j] = x;
    }
}

/* Marks the `count` largest of the group's positive scores in `chosen`; ties: the first. */
static size_t choose(const double *scores, size_t planes, size_t count, int32_t *chosen)
{
    size_t taken = 0;
    for (; taken < count; taken++) {
        size_t best = planes;
        for (size_t p = 0; p < planes; p++) {
            int already = 0;
            for (size_t i = 0; i < taken; i++)
                already |= chosen[i] == (int32_t)p;
            if (!already && scores[p] > 0 && (best == planes || scores[p] > scores[best]))
                best = p;
        }
        if (best == planes)
            break;
        chosen[taken] = (int32_t)best;
    }
    for (size_t i = 1; i < taken; i++) /* insertion sort: at most head_dim / 2 of them */
        for (size_t j = i; j && chosen[j - 1] > chosen[j]; j--) {
            int32_t swap = chosen[j];
            chosen[j] = chosen[j - 1];
            chosen[j - 1] = swap;
        }
    return taken;
}

static void fold_group(void *context, size_t group, int worker)
{
    rope_call *c = context;
    const fp_heads *h = c->heads;
    fp_fold_out *out = c->out;
    size_t per_group = h->heads / h->groups, planes = h->head_dim / 2;
    size_t n = h->left.cols + (h->left_bias.data != NULL);
    size_t de = h->right.cols + (h->right_extra.data != NULL);
    size_t left_size = out->capacity * 2 * n, right_size = out->capacity * 2 * de;
    double *left = out->left + group * per_group * left_size;
    double *right = out->right + group * right_size;
    int32_t *chosen = c->planes + group * out->capacity;
    const double *scores = c->scores + group * planes;
    (void)worker;

    memset(left, 0, per_group * left_size * sizeof(double));
    memset(right, 0, right_size * sizeof(double));
    size_t wanted = c->ranks ? (size_t)c->ranks[group] : planes;
    size_t rank = choose(scores, planes, wanted, chosen);
    for (size_t i = rank; i < out->capacity; i++)
        chosen[i] = -1;

    out->energy[group] = out->error[group] = 0;
    for (size_t p = 0; p < planes; p++)
        out->energy[group] += scores[p];
    out->error[group] = out->energy[group];
    for (size_t i = 0; i < rank; i++)
        out->error[group] -= scores[chosen[i]];
    if (out->error[group] < 0 || rank == planes)
        out->error[group] = 0;
    out->ranks[group] = (int32_t)rank;

    for (size_t i = 0; i < rank; i++) {
        size_t plane = (size_t)chosen[i];
        double *k = right + i * 2 * de;
        load_plane(c, &h->right, &h->right_extra, group, plane, k, k + de);
        double re = 1, im = 0;
        if (out->pivots) {
            size_t best = 0;
            double largest = -1;
            for (size_t j = 0; j < h->right.cols; j++) {
                double size = k[j] * k[j] + k[de + j] * k[de + j];
                if (size > largest) {
                    largest = size;
                    best = j;
                }
            }
            out->pivots[group * out->capacity + i] = (int32_t)best;
            if (largest > 0) {
                re = k[best];
                im = k[de + best];
                multiply(k, k + de, de, re / largest, -im / largest);
                k[best] = 1.0; /* exactly, so that it need not be stored */
                k[de + best] = 0.0;
            }
        }
        for (size_t g = 0; g < per_group; g++) {
            double *q = left + g * left_size + i * 2 * n;
            load_plane(c, &h->left, &h->left_bias, group * per_group + g, plane, q, q + n);
            multiply(q, q + n, n, re, -im);
        }
    }
    for (size_t i = rank; out->pivots && i < out->capacity; i++)
        out->pivots[group * out->capacity + i] = -1;
}

fp_status fp_rope_apply(const fp_heads *h, fp_rope pairing, const double *scores,
                        const int32_t *ranks, int32_t *planes, fp_fold_out *out, int threads)
{
    fp_status status = check(h, pairing);
    if (status)
        return status;
    if (!scores || !planes || !out || !out->left || !out->right || !out->ranks || !out->error ||
        !out->energy)
        return FP_ERR_ARGUMENT;
    for (size_t j = 0; ranks && j < h->groups; j++)
        if (ranks[j] < 0 || (size_t)ranks[j] > h->head_dim / 2 || (size_t)ranks[j] > out->capacity)
            return FP_ERR_RANGE;
    if (!ranks && out->capacity < h->head_dim / 2)
        return FP_ERR_RANGE;
    rope_call c = {.heads = h,
                   .pairing = pairing,
                   .scores = (double *)(uintptr_t)scores,
                   .ranks = ranks,
                   .planes = planes,
                   .out = out};
    fp_parallel_for(h->groups, threads, fold_group, &c);
    return FP_OK;
}
