/* Forward propagation pruning: masks. Which elements are suspected follows from their scores alone;
 * a mask has a set bit for every element that is kept. */
#include <math.h>
#include <string.h>

#include "parallel.h"
#include "scores.h"

static void set_bit(uint8_t *mask, size_t i)
{
    mask[i >> 3] |= (uint8_t)(1u << (i & 7));
}

/* ---- one threshold ---- */

typedef struct threshold_call {
    const fp_kernels *kernels;
    const fp_scored *t;
    uint8_t *mask;
    uint64_t *ties; /* per chunk */
    double score;
    float limit; /* largest float32 not above score: s > score and s > limit say the same */
} threshold_call;

static void mask_chunk(void *context, size_t item, int worker)
{
    threshold_call *c = context;
    size_t n = fp_scored_size(c->t), begin = item * FP_CHUNK;
    size_t end = begin + FP_CHUNK < n ? begin + FP_CHUNK : n;
    union {
        float single[FP_PIECE];
        double twice[FP_PIECE / 2];
    } buffer;
    (void)worker;
    c->ties[item] = 0;
    if (c->t->dtype != FP_F64) {
        for (size_t i = begin; i < end; i += FP_PIECE) {
            size_t m = end - i < FP_PIECE ? end - i : FP_PIECE;
            const float *s = fp_scores_load(c->kernels, c->t, i, m, buffer.single);
            c->ties[item] += c->kernels->mask_above(s, m, c->limit, c->mask + i / 8);
        }
        return;
    }
    memset(c->mask + begin / 8, 0, fp_mask_bytes(end - begin));
    for (size_t i = begin; i < end; i += FP_PIECE / 2) {
        size_t m = end - i < FP_PIECE / 2 ? end - i : FP_PIECE / 2;
        fp_scores_load_double(c->t, i, m, buffer.twice);
        for (size_t j = 0; j < m; j++) {
            if (buffer.twice[j] > c->score)
                set_bit(c->mask, i + j);
            c->ties[item] += buffer.twice[j] == c->score;
        }
    }
}

/* Keeps the elements of a chunk that equal the threshold, except the first `removed`. */
static void keep_ties(threshold_call *c, size_t item, uint64_t removed)
{
    size_t n = fp_scored_size(c->t), begin = item * FP_CHUNK;
    size_t end = begin + FP_CHUNK < n ? begin + FP_CHUNK : n;
    double buffer[FP_PIECE / 2];
    for (size_t i = begin; i < end; i += FP_PIECE / 2) {
        size_t m = end - i < FP_PIECE / 2 ? end - i : FP_PIECE / 2;
        fp_scores_load_double(c->t, i, m, buffer);
        for (size_t j = 0; j < m; j++) {
            if (buffer[j] != c->score)
                continue;
            if (removed)
                removed--;
            else
                set_bit(c->mask, i + j);
        }
    }
}

size_t fp_mask_work(const fp_scored *t)
{
    return fp_chunks(fp_scored_size(t)) * sizeof(uint64_t);
}

fp_status fp_mask_threshold(const fp_kernels *kernels, const fp_scored *t, fp_threshold threshold,
                            uint8_t *mask, uint64_t *ties_used, int threads, void *work,
                            size_t work_bytes)
{
    fp_status status = fp_scored_check(t);
    if (status)
        return status;
    size_t n = fp_scored_size(t);
    *ties_used = 0;
    if (!n)
        return FP_OK;
    if (!kernels || !mask || !work || work_bytes < fp_mask_work(t) || !(threshold.score >= 0))
        return FP_ERR_ARGUMENT;

    threshold_call c = {.kernels = kernels, .t = t, .mask = mask, .ties = work};
    c.score = fabs(threshold.score); /* the bits of -0.0 are not those of 0.0 */
    c.limit = (float)c.score;
    if ((double)c.limit > c.score)
        c.limit = nextafterf(c.limit, 0.0f);
    int exact = t->dtype == FP_F64 || (double)c.limit == c.score;
    fp_parallel_for(fp_chunks(n), threads, mask_chunk, &c);

    for (size_t i = 0; exact && i < fp_chunks(n); i++) {
        uint64_t left = threshold.ties - *ties_used;
        uint64_t removed = c.ties[i] < left ? c.ties[i] : left;
        if (removed < c.ties[i])
            keep_ties(&c, i, removed);
        *ties_used += removed;
    }
    return FP_OK;
}

/* ---- a threshold per row ---- */

typedef struct rows_call {
    const fp_scored *t;
    size_t k;
    uint8_t *mask;
    double *work; /* 2 x cols per worker */
} rows_call;

/* Eight rows at a time: their bits fill whole bytes whatever the number of columns. */
static void mask_eight_rows(void *context, size_t item, int worker)
{
    rows_call *c = context;
    size_t cols = c->t->cols, first = item * 8;
    size_t last = first + 8 < c->t->rows ? first + 8 : c->t->rows;
    double *scores = c->work + (size_t)worker * 2 * cols, *scratch = scores + cols;
    memset(c->mask + item * cols, 0, fp_mask_bytes((last - first) * cols));
    for (size_t row = first; row < last; row++) {
        fp_scores_load_double(c->t, row * cols, cols, scores);
        double threshold = -1;
        size_t ties = 0;
        if (c->k) {
            memcpy(scratch, scores, cols * sizeof *scores);
            threshold = fp_kth_smallest(scratch, cols, c->k - 1);
            ties = c->k;
            for (size_t j = 0; j < cols; j++)
                ties -= scores[j] < threshold;
        }
        for (size_t j = 0; j < cols; j++) {
            if (scores[j] < threshold)
                continue;
            if (scores[j] == threshold && ties)
                ties--;
            else
                set_bit(c->mask, row * cols + j);
        }
    }
}

size_t fp_mask_rows_work(const fp_scored *t, int threads)
{
    return (size_t)fp_clamp_threads(threads) * 2 * t->cols * sizeof(double);
}

fp_status fp_mask_rows(const fp_scored *t, size_t k, uint8_t *mask, int threads, void *work,
                       size_t work_bytes)
{
    fp_status status = fp_scored_check(t);
    if (status)
        return status;
    if (k > t->cols)
        return FP_ERR_RANGE;
    if (!fp_scored_size(t))
        return FP_OK;
    if (!mask || !work || work_bytes < fp_mask_rows_work(t, threads))
        return FP_ERR_ARGUMENT;
    rows_call c = {t, k, mask, work};
    fp_parallel_for((t->rows + 7) / 8, threads, mask_eight_rows, &c);
    return FP_OK;
}

/* ---- n of every m ---- */

typedef struct nm_call {
    const fp_scored *t;
    unsigned n, m;
    uint8_t *mask;
} nm_call;

static void mask_nm_rows(void *context, size_t item, int worker)
{
    nm_call *c = context;
    size_t cols = c->t->cols, first = item * 8;
    size_t last = first + 8 < c->t->rows ? first + 8 : c->t->rows;
    double buffer[FP_PIECE / 2];
    size_t step = FP_PIECE / 2 / c->m * c->m; /* whole groups */
    (void)worker;
    memset(c->mask + item * cols, 0, fp_mask_bytes((last - first) * cols));
    for (size_t row = first; row < last; row++) {
        for (size_t begin = 0; begin < cols; begin += step) {
            size_t count = cols - begin < step ? cols - begin : step;
            fp_scores_load_double(c->t, row * cols + begin, count, buffer);
            for (size_t g = 0; g < count; g += c->m) {
                unsigned size = count - g < c->m ? (unsigned)(count - g) : c->m;
                const double *s = buffer + g;
                for (unsigned i = 0; i < size; i++) {
                    unsigned better = 0;
                    for (unsigned j = 0; j < size; j++)
                        better += s[j] > s[i] || (s[j] == s[i] && j < i);
                    if (better < c->n)
                        set_bit(c->mask, row * cols + begin + g + i);
                }
            }
        }
    }
}

fp_status fp_mask_nm(const fp_scored *t, unsigned n, unsigned m, uint8_t *mask, int threads)
{
    fp_status status = fp_scored_check(t);
    if (status)
        return status;
    if (n < 1 || n > m || m > 64)
        return FP_ERR_RANGE;
    if (!fp_scored_size(t))
        return FP_OK;
    if (!mask)
        return FP_ERR_ARGUMENT;
    nm_call c = {t, n, m, mask};
    fp_parallel_for((t->rows + 7) / 8, threads, mask_nm_rows, &c);
    return FP_OK;
}

/* ---- blocks ---- */

typedef struct blocks_call {
    const uint8_t *blocks;
    size_t rows, cols, block_rows, block_cols, grid_cols;
    uint8_t *mask;
} blocks_call;

static void expand_eight_rows(void *context, size_t item, int worker)
{
    blocks_call *c = context;
    size_t first = item * 8, last = first + 8 < c->rows ? first + 8 : c->rows;
    (void)worker;
    memset(c->mask + item * c->cols, 0, fp_mask_bytes((last - first) * c->cols));
    for (size_t row = first; row < last; row++) {
        size_t block = row / c->block_rows * c->grid_cols;
        for (size_t left = 0; left < c->cols; left += c->block_cols, block++) {
            size_t right = left + c->block_cols < c->cols ? left + c->block_cols : c->cols;
            if (c->blocks[block >> 3] >> (block & 7) & 1)
                for (size_t col = left; col < right; col++)
                    set_bit(c->mask, row * c->cols + col);
        }
    }
}

fp_status fp_mask_blocks(const uint8_t *block_mask, size_t rows, size_t cols, size_t block_rows,
                         size_t block_cols, uint8_t *mask, int threads)
{
    if (!rows || !cols)
        return FP_OK;
    if (!block_mask || !mask || !block_rows || !block_cols)
        return FP_ERR_ARGUMENT;
    if (rows > SIZE_MAX / cols)
        return FP_ERR_OVERFLOW;
    blocks_call c = {block_mask, rows, cols, block_rows, block_cols, (cols - 1) / block_cols + 1,
                     mask};
    fp_parallel_for((rows + 7) / 8, threads, expand_eight_rows, &c);
    return FP_OK;
}
