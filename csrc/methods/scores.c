#include "scores.h"

#include <math.h>
#include <string.h>

#include "parallel.h"

fp_status fp_scored_check(const fp_scored *t)
{
    if (!t || (!t->x && t->rows && t->cols) || !(t->scale >= 0) || isinf(t->scale))
        return FP_ERR_ARGUMENT;
    size_t item = fp_dtype_size(t->dtype);
    if (!item)
        return FP_ERR_DTYPE;
    if (t->cols && t->rows > SIZE_MAX / t->cols / item)
        return FP_ERR_OVERFLOW;
    return FP_OK;
}

void fp_bfloat_to_float(const uint16_t *x, size_t n, float *y)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)x[i] << 16;
        memcpy(&y[i], &bits, sizeof bits);
    }
}

/* y[i] *= col_scale of the column that flat index begin + i lies in. */
static void scale_columns(const fp_scored *t, size_t begin, size_t n, float *y)
{
    size_t col = begin % t->cols;
    for (size_t i = 0; i < n;) {
        size_t run = t->cols - col < n - i ? t->cols - col : n - i;
        for (size_t j = 0; j < run; j++)
            y[i + j] *= t->col_scale[col + j];
        i += run;
        col = 0;
    }
}

const float *fp_scores_load(const fp_kernels *kernels, const fp_scored *t, size_t begin, size_t n,
                            float *buffer)
{
    float scale = (float)t->scale;
    const float *direct = (const float *)t->x + begin;
    switch (t->dtype) {
    case FP_F32:
        if (scale == 1.0f && !t->col_scale)
            return direct;
        for (size_t i = 0; i < n; i++)
            buffer[i] = fabsf(direct[i]) * scale;
        break;
    case FP_F64:
        /* rounding is monotone, so the order is kept up to float32's ties */
        for (size_t i = 0; i < n; i++)
            buffer[i] = (float)(fabs(((const double *)t->x)[begin + i]) * t->scale);
        break;
    case FP_F16:
    case FP_BF16:
        if (t->dtype == FP_F16)
            kernels->half_to_float((const uint16_t *)t->x + begin, n, buffer);
        else
            fp_bfloat_to_float((const uint16_t *)t->x + begin, n, buffer);
        for (size_t i = 0; i < n; i++)
            buffer[i] = fabsf(buffer[i]) * scale;
        break;
    case FP_I8: /* refused before */
        break;
    }
    if (t->col_scale)
        scale_columns(t, begin, n, buffer);
    return buffer;
}

void fp_scores_load_double(const fp_scored *t, size_t begin, size_t n, double *buffer)
{
    if (t->dtype == FP_F64) {
        size_t col = t->col_scale ? begin % t->cols : 0;
        for (size_t i = 0; i < n; i++) {
            buffer[i] = fabs(((const double *)t->x)[begin + i]) * t->scale;
            if (t->col_scale) {
                buffer[i] *= t->col_scale[col];
                col = col + 1 == t->cols ? 0 : col + 1;
            }
        }
        return;
    }
    float piece[FP_PIECE];
    for (size_t i = 0; i < n; i += FP_PIECE) {
        size_t m = n - i < FP_PIECE ? n - i : FP_PIECE;
        const float *s = fp_scores_load(&fp_kernels_scalar, t, begin + i, m, piece);
        for (size_t j = 0; j < m; j++)
            buffer[i + j] = fabs((double)s[j]);
    }
}

/* ---- reductions: a fixed number of parts, so that sums do not depend on the threads ---- */

enum { PARTS = 256 };

typedef struct reduction {
    const fp_scored *t;
    size_t part;
    double sum[PARTS];
    int finite[PARTS];
} reduction;

static void sum_squares(void *context, size_t item, int worker)
{
    reduction *r = context;
    size_t n = fp_scored_size(r->t), begin = item * r->part;
    size_t end = begin + r->part < n ? begin + r->part : n;
    double lanes[8] = {0}, buffer[FP_PIECE / 4];
    (void)worker;
    for (size_t i = begin; i < end; i += FP_PIECE / 4) {
        size_t m = end - i < FP_PIECE / 4 ? end - i : FP_PIECE / 4, j = 0;
        if (r->t->dtype == FP_F32 && r->t->scale == 1.0 && !r->t->col_scale) {
            const float *x = (const float *)r->t->x + i; /* the common case, without a copy */
            for (; j + 8 <= m; j += 8)
                for (size_t l = 0; l < 8; l++)
                    lanes[l] += (double)x[j + l] * (double)x[j + l];
            for (; j < m; j++)
                lanes[j % 8] += (double)x[j] * (double)x[j];
            continue;
        }
        fp_scores_load_double(r->t, i, m, buffer);
        for (; j + 8 <= m; j += 8)
            for (size_t l = 0; l < 8; l++)
                lanes[l] += buffer[j + l] * buffer[j + l];
        for (; j < m; j++)
            lanes[j % 8] += buffer[j] * buffer[j];
    }
    for (size_t l = 0; l < 8; l++)
        r->sum[item] += lanes[l];
}

/* Elements per part: a multiple of the piece size so that lanes are the same for any n. */
static size_t part_size(size_t n)
{
    return (n / PARTS + FP_CHUNK) / FP_CHUNK * FP_CHUNK;
}

double fp_energy(const fp_scored *t, int threads)
{
    size_t n = fp_scored_size(t);
    reduction r = {.t = t, .part = part_size(n)};
    size_t parts = (n + r.part - 1) / r.part;
    fp_parallel_for(parts, threads, sum_squares, &r);
    double total = 0;
    for (size_t i = 0; i < parts; i++)
        total += r.sum[i];
    return total;
}

static void check_finite(void *context, size_t item, int worker)
{
    reduction *r = context;
    size_t n = fp_scored_size(r->t), begin = item * r->part;
    size_t end = begin + r->part < n ? begin + r->part : n;
    int bad = 0;
    (void)worker;
    switch (r->t->dtype) { /* a full exponent is an infinity or a NaN */
    case FP_F32:
        for (size_t i = begin; i < end; i++)
            bad |= (((const uint32_t *)r->t->x)[i] & 0x7f800000u) == 0x7f800000u;
        break;
    case FP_F64:
        for (size_t i = begin; i < end; i++)
            bad |= (((const uint64_t *)r->t->x)[i] & 0x7ff0000000000000u) == 0x7ff0000000000000u;
        break;
    case FP_F16:
        for (size_t i = begin; i < end; i++)
            bad |= (((const uint16_t *)r->t->x)[i] & 0x7c00u) == 0x7c00u;
        break;
    case FP_BF16:
        for (size_t i = begin; i < end; i++)
            bad |= (((const uint16_t *)r->t->x)[i] & 0x7f80u) == 0x7f80u;
        break;
    case FP_I8:
        break;
    }
    r->finite[item] = !bad;
}

int fp_all_finite(const void *x, fp_dtype dtype, size_t n, int threads)
{
    fp_scored t = {.x = x, .dtype = dtype, .rows = 1, .cols = n, .scale = 1};
    reduction r = {.t = &t, .part = part_size(n)};
    size_t parts = (n + r.part - 1) / r.part;
    fp_parallel_for(parts, threads, check_finite, &r);
    for (size_t i = 0; i < parts; i++)
        if (!r.finite[i])
            return 0;
    return 1;
}

/* ---- blocks ---- */

typedef struct block_call {
    const fp_scored *t;
    size_t block_rows, block_cols, grid_cols;
    float *scores;
} block_call;

static void score_block_row(void *context, size_t item, int worker)
{
    block_call *b = context;
    const fp_scored *t = b->t;
    size_t first = item * b->block_rows;
    size_t last = first + b->block_rows < t->rows ? first + b->block_rows : t->rows;
    double buffer[FP_PIECE / 4];
    (void)worker;
    for (size_t g = 0; g < b->grid_cols; g++) {
        size_t left = g * b->block_cols;
        size_t right = left + b->block_cols < t->cols ? left + b->block_cols : t->cols;
        double sum = 0;
        for (size_t row = first; row < last; row++) {
            for (size_t col = left; col < right; col += FP_PIECE / 4) {
                size_t m = right - col < FP_PIECE / 4 ? right - col : FP_PIECE / 4;
                fp_scores_load_double(t, row * t->cols + col, m, buffer);
                for (size_t j = 0; j < m; j++)
                    sum += buffer[j] * buffer[j];
            }
        }
        b->scores[item * b->grid_cols + g] =
            (float)sqrt(sum / ((double)(last - first) * (double)(right - left)));
    }
}

fp_status fp_block_scores(const fp_scored *t, size_t block_rows, size_t block_cols, float *scores,
                          int threads)
{
    fp_status status = fp_scored_check(t);
    if (status)
        return status;
    if (!block_rows || !block_cols || !scores)
        return FP_ERR_ARGUMENT;
    if (!t->rows || !t->cols)
        return FP_OK;
    block_call b = {t, block_rows, block_cols, (t->cols - 1) / block_cols + 1, scores};
    fp_parallel_for((t->rows - 1) / block_rows + 1, threads, score_block_row, &b);
    return FP_OK;
}
