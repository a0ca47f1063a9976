/* The OBS sweep of forward propagation pruning: SparseGPT's masks and weights from a UDU^T factor
 * of H. Rows are swept in tiles that are stored transposed, so that loops run over the rows of a
 * tile; all but a few columns at a time meet the factor in matrix products.
 *
 * With V = w - w^ of the columns to the left of a block and A's parts A_l (left x block) and A_b
 * (block x block), the best values of all the block's columns together are w' = w + V A_l (I +
 * A_b)^-1. Removing column j then moves the later ones by -w'_j times row j of (I + A_b)^-1: a
 * block is SparseGPT's, with this in place of the factor of the inverse of H. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "lapack.h"
#include "matrix.h"
#include "parallel.h"
#include "scores.h"
#include "work.h"

enum {
    TILE = 96, /* rows, a multiple of 8: no byte of a mask belongs to two tiles */
    STEP = 16, /* columns that are swept one by one between two products */
    BINS = 1 << 15
};
static const float ONE = 1.0f;

static size_t round_up(size_t n, size_t step)
{
    return (n + step - 1) / step * step;
}

/* One worker's buffers, columns of a block x rows of a tile. */
typedef struct tile_buffers {
    float *w, *errors;
    uint8_t *keep;
    uint32_t *histogram;
    double *row; /* a row of scores or weights */
} tile_buffers;

typedef struct sweep_call {
    const fp_matrix *w;
    const float *a;
    const fp_obs_options *options;
    uint8_t *mask;
    float *out;
    size_t rows, cols, width, tiles; /* width: columns per block */
    size_t step;
    float *moved;      /* per tile: cols x TILE, w - w^ of the columns already swept, in the block
                        * under way w' */
    float *inverse;    /* per block: (I + A)^-1 of its own columns, width x width */
    float *scores;     /* per tile: width x TILE */
    float *col_scale;  /* sqrt(D_j), largest 1 */
    float *row_scale;  /* sqrt(row_weight_i), largest 1 */
    float limit;       /* lower scores go, of equal ones as many as a tile's quota says */
    size_t *tile_ties; /* FP_OBS_BLOCK: scores equal to the limit that go, per tile */
    double *candidates;
    char *buffers;
    size_t stride; /* bytes per worker */
    size_t begin;  /* FP_OBS_BLOCK: first column of the block under way */
} sweep_call;

static tile_buffers lay_out_worker(const sweep_call *c, char *base, size_t *bytes)
{
    tile_buffers b;
    size_t used = 0;
    b.w = fp_take(base, &used, c->width * TILE, sizeof *b.w);
    b.errors = fp_take(base, &used, c->width * TILE, sizeof *b.errors);
    b.keep = fp_take(base, &used, c->width * TILE, sizeof *b.keep);
    b.histogram = fp_take(base, &used, BINS, sizeof *b.histogram);
    b.row = fp_take(base, &used, c->width, sizeof *b.row);
    *bytes = used;
    return b;
}

/* Everything in one piece of memory; with base NULL only its size. */
static size_t lay_out(sweep_call *c, char *base, int threads)
{
    const fp_obs_options *o = c->options;
    size_t used = 0;
    c->width = o->block_cols < c->cols ? o->block_cols : c->cols;
    if (o->rule == FP_OBS_NM)
        c->width = round_up(c->width, o->m);
    c->step = o->rule == FP_OBS_NM && o->m > 1 ? round_up(STEP, o->m) : STEP;
    c->tiles = (c->rows + TILE - 1) / TILE;
    c->moved = fp_take(base, &used, c->tiles * TILE * c->cols, sizeof(float));
    c->inverse = fp_take(base, &used, c->cols * c->width + c->width * c->width, sizeof(float));
    c->scores = fp_take(base, &used, c->tiles * TILE * c->width, sizeof(float));
    c->candidates =
        fp_take(base, &used, o->rule == FP_OBS_BLOCK ? c->rows * c->width : 0, sizeof(double));
    c->tile_ties = fp_take(base, &used, c->tiles, sizeof(size_t));
    c->col_scale = fp_take(base, &used, c->cols, sizeof(float));
    c->row_scale = fp_take(base, &used, c->tiles * TILE, sizeof(float));
    lay_out_worker(c, NULL, &c->stride);
    c->buffers = base ? base + used : NULL;
    return used + (size_t)fp_clamp_threads(threads) * c->stride;
}

static size_t tile_rows(const sweep_call *c, size_t tile)
{
    return c->rows - tile * TILE < TILE ? c->rows - tile * TILE : TILE;
}

static size_t block_end(const sweep_call *c, size_t begin)
{
    return c->cols - begin < c->width ? c->cols : begin + c->width;
}

/* w (cols x TILE) = the tile's weights in columns [begin, end), transposed. */
static void load_weights(const sweep_call *c, size_t tile, size_t begin, size_t end,
                         tile_buffers *b)
{
    size_t rows = tile_rows(c, tile), cols = end - begin;
    fp_matrix part = *c->w;
    part.data = (const char *)part.data + (ptrdiff_t)begin * part.col_stride;
    part.cols = cols;
    for (size_t i = 0; i < rows; i++) {
        size_t row = tile * TILE + i;
        if (part.dtype == FP_F32 && part.col_stride == (ptrdiff_t)sizeof(float)) {
            const char *source = (const char *)part.data + (ptrdiff_t)row * part.row_stride;
            for (size_t j = 0; j < cols; j++)
                memcpy(&b->w[j * TILE + i], source + j * sizeof(float), sizeof(float));
            continue;
        }
        fp_matrix_load(&part, row, 1, b->row, 0, 1);
        for (size_t j = 0; j < cols; j++)
            b->w[j * TILE + i] = (float)b->row[j];
    }
}

/* y (rows of a tile x n) = beta y + alpha x (rows x k) B, where B (k x n) has ldb numbers a row. */
static void multiply(size_t rows, size_t n, size_t k, float alpha, const float *x, const float *b,
                     size_t ldb, float beta, float *y)
{
    int32_t m32 = (int32_t)rows, n32 = (int32_t)n, k32 = (int32_t)k, tile = TILE;
    int32_t ldb32 = (int32_t)ldb;
    fp_sgemm("N", "T", &m32, &n32, &k32, &alpha, x, &tile, b, &ldb32, &beta, y, &tile, 1, 1);
}

static float *tile_moved(const sweep_call *c, size_t tile)
{
    return c->moved + tile * TILE * c->cols;
}

static float *tile_scores(const sweep_call *c, size_t tile)
{
    return c->scores + tile * TILE * c->width;
}

static void score(const sweep_call *c, size_t tile, size_t column, size_t rows, const float *w,
                  float *s)
{
    const float *row_scale = c->row_scale + tile * TILE;
    float scale = c->col_scale[column];
    for (size_t i = 0; i < rows; i++) {
        float root = fabsf(w[i]) * scale * row_scale[i];
        s[i] = root < FLT_MAX ? root : FLT_MAX; /* selection can count on numbers */
    }
}

/* The inverse of a block's own part of I + A: how far its columns move when one before them is
 * removed and all in between are free. */
static void invert_block(void *context, size_t item, int worker)
{
    sweep_call *c = context;
    size_t begin = item * c->width, n = block_end(c, begin) - begin;
    const float *a = c->a + begin * c->cols + begin;
    float *inverse = c->inverse + begin * c->width;
    (void)worker;
    for (size_t j = n; j-- > 0;) {
        float *row = inverse + j * c->width;
        memset(row, 0, n * sizeof *row);
        row[j] = 1.0f;
        for (size_t l = j + 1; l < n; l++) {
            float factor = a[j * c->cols + l];
            const float *other = inverse + l * c->width;
            for (size_t k = l; k < n; k++)
                row[k] -= factor * other[k];
        }
    }
}

/* Brings the columns of a block up to date with what moved to their left, and scores them. */
static void prepare(const sweep_call *c, size_t tile, size_t begin, tile_buffers *b)
{
    size_t cols = block_end(c, begin) - begin, rows = tile_rows(c, tile);
    float *moved = tile_moved(c, tile), *w = moved + begin * TILE;
    int32_t m = (int32_t)rows, n = (int32_t)cols, ld = TILE, ldi = (int32_t)c->width;
    load_weights(c, tile, begin, begin + cols, b);
    if (begin) {
        multiply(rows, cols, begin, 1.0f, moved, c->a + begin, c->cols, 0.0f, w);
        fp_strmm("R", "L", "T", "U", &m, &n, &ONE, c->inverse + begin * c->width, &ldi, w, &ld, 1,
                 1, 1, 1);
    } else {
        memset(w, 0, cols * TILE * sizeof *w);
    }
    for (size_t j = 0; j < cols; j++) {
        for (size_t i = 0; i < rows; i++)
            w[j * TILE + i] += b->w[j * TILE + i];
        score(c, tile, begin + j, rows, w + j * TILE, tile_scores(c, tile) + j * TILE);
    }
}

/* keep = scores above the limit, and those equal to it beyond the quota of ties. */
static void keep_above(const sweep_call *c, size_t tile, size_t cols, size_t ties, uint8_t *keep)
{
    const float *s = tile_scores(c, tile);
    size_t rows = tile_rows(c, tile);
    for (size_t j = 0; j < cols; j++)
        for (size_t i = 0; i < rows; i++)
            keep[j * TILE + i] = s[j * TILE + i] >= c->limit;
    for (size_t i = 0; ties && i < rows; i++)
        for (size_t j = 0; ties && j < cols; j++)
            if (s[j * TILE + i] == c->limit) {
                keep[j * TILE + i] = 0;
                ties--;
            }
}

/* Of count * columns / cols the part that falls into [begin, end), summing up exactly. */
static uint64_t share(uint64_t count, size_t begin, size_t end, size_t cols)
{
    /* count = q * cols + r: no product larger than cols^2 */
    uint64_t q = count / cols, r = count % cols;
    return q * (end - begin) + (2 * r * end + cols) / (2 * cols) -
           (2 * r * begin + cols) / (2 * cols);
}

static void keep_row_shares(const sweep_call *c, size_t tile, size_t begin, size_t end,
                            tile_buffers *b)
{
    const float *s = tile_scores(c, tile);
    size_t rows = tile_rows(c, tile), cols = end - begin;
    size_t k = (size_t)share(c->options->count, begin, end, c->cols);
    for (size_t i = 0; i < rows; i++) {
        double limit = -1.0;
        size_t ties = k;
        for (size_t j = 0; j < cols; j++)
            b->row[j] = (double)s[j * TILE + i];
        if (k) {
            limit = fp_kth_smallest(b->row, cols, k - 1);
            for (size_t j = 0; j < cols; j++)
                ties -= b->row[j] < limit;
        }
        for (size_t j = 0; j < cols; j++) {
            double own = (double)s[j * TILE + i];
            int tie = own == limit && ties;
            ties -= (size_t)tie;
            b->keep[j * TILE + i] = own >= limit && !tie;
        }
    }
}

static void keep_given(const sweep_call *c, size_t tile, size_t begin, size_t end, tile_buffers *b)
{
    size_t rows = tile_rows(c, tile);
    for (size_t i = 0; i < rows; i++) {
        size_t bit = (tile * TILE + i) * c->cols + begin;
        for (size_t j = 0; j < end - begin; j++, bit++)
            b->keep[j * TILE + i] = c->mask[bit >> 3] >> (bit & 7) & 1;
    }
}

/* The n dearest of a group of columns stay: scores of up to m columns x TILE. */
static void keep_dearest(const sweep_call *c, size_t rows, size_t size, const float *s,
                         uint8_t *keep)
{
    for (size_t j = 0; j < size; j++) {
        uint8_t better[TILE] = {0};
        for (size_t l = 0; l < size; l++)
            for (size_t i = 0; i < rows; i++)
                better[i] +=
                    l < j ? s[l * TILE + i] >= s[j * TILE + i] : s[l * TILE + i] > s[j * TILE + i];
        for (size_t i = 0; i < rows; i++)
            keep[j * TILE + i] = better[i] < c->options->n;
    }
}

/* Columns [first, last) of a block one by one: w' becomes w^. */
static void sweep_step(const sweep_call *c, size_t tile, size_t begin, size_t first, size_t last,
                       tile_buffers *b)
{
    size_t rows = tile_rows(c, tile), m = c->options->m;
    float *w = tile_moved(c, tile) + begin * TILE, *scores = tile_scores(c, tile);
    const float *inverse = c->inverse + begin * c->width;
    for (size_t j = first; j < last; j++) {
        if (c->options->rule == FP_OBS_NM && j % m == 0) {
            size_t size = last - j < m ? last - j : m;
            for (size_t l = 0; l < size; l++)
                score(c, tile, begin + j + l, rows, w + (j + l) * TILE, scores + l * TILE);
            keep_dearest(c, rows, size, scores, b->keep + j * TILE);
        }
        float *own = w + j * TILE, *error = b->errors + j * TILE;
        for (size_t i = 0; i < rows; i++) {
            error[i] = b->keep[j * TILE + i] ? 0.0f : own[i];
            own[i] = b->keep[j * TILE + i] ? own[i] : 0.0f;
        }
        for (size_t l = j + 1; l < last; l++) {
            float factor = inverse[j * c->width + l], *other = w + l * TILE;
            for (size_t i = 0; i < rows; i++)
                other[i] -= error[i] * factor;
        }
    }
}

/* Bits of columns [begin, end) of the tile. */
static void write_mask(const sweep_call *c, size_t tile, size_t begin, size_t end,
                       const uint8_t *keep)
{
    size_t rows = tile_rows(c, tile);
    for (size_t j = begin; j < end; j += 8) {
        size_t columns = end - j < 8 ? end - j : 8;
        uint8_t bits[TILE] = {0};
        for (size_t l = 0; l < columns; l++)
            for (size_t i = 0; i < rows; i++)
                bits[i] |= (uint8_t)(keep[(j - begin + l) * TILE + i] << l);
        for (size_t i = 0; i < rows; i++) {
            size_t bit = (tile * TILE + i) * c->cols + j;
            unsigned placed = (unsigned)bits[i] << (bit & 7);
            c->mask[bit >> 3] |= (uint8_t)placed;
            if (placed >> 8)
                c->mask[(bit >> 3) + 1] |= (uint8_t)(placed >> 8);
        }
    }
}

static void write_weights(const sweep_call *c, size_t tile, size_t begin, size_t end)
{
    const float *w = tile_moved(c, tile) + begin * TILE;
    for (size_t i = 0, rows = tile_rows(c, tile); i < rows; i++) {
        float *target = c->out + (tile * TILE + i) * c->cols + begin;
        for (size_t j = 0; j < end - begin; j++)
            target[j] = w[j * TILE + i];
    }
}

/* Sweeps a block whose keep is known (NM: will be, group by group). */
static void finish(const sweep_call *c, size_t tile, size_t begin, tile_buffers *b)
{
    size_t end = block_end(c, begin), cols = end - begin, rows = tile_rows(c, tile);
    float *w = tile_moved(c, tile) + begin * TILE;
    for (size_t j = 0; j < cols; j += c->step) {
        size_t last = cols - j < c->step ? cols : j + c->step;
        if (j)
            multiply(rows, last - j, j, -1.0f, b->errors, c->inverse + begin * c->width + j,
                     c->width, 1.0f, w + j * TILE);
        sweep_step(c, tile, begin, j, last, b);
    }
    if (c->options->rule != FP_OBS_GIVEN)
        write_mask(c, tile, begin, end, b->keep);
    if (c->out)
        write_weights(c, tile, begin, end);
    load_weights(c, tile, begin, end, b);
    for (size_t j = 0; j < cols; j++)
        for (size_t i = 0; i < rows; i++)
            w[j * TILE + i] = b->w[j * TILE + i] - w[j * TILE + i];
}

static tile_buffers buffers_of(const sweep_call *c, int worker)
{
    size_t bytes;
    return lay_out_worker(c, c->buffers + (size_t)worker * c->stride, &bytes);
}

/* Rules that need no other row. */
static void sweep_tile(void *context, size_t tile, int worker)
{
    sweep_call *c = context;
    tile_buffers b = buffers_of(c, worker);
    for (size_t begin = 0; begin < c->cols; begin += c->width) {
        size_t end = block_end(c, begin);
        prepare(c, tile, begin, &b);
        if (c->options->rule == FP_OBS_THRESHOLD)
            keep_above(c, tile, end - begin, 0, b.keep);
        else if (c->options->rule == FP_OBS_ROW)
            keep_row_shares(c, tile, begin, end, &b);
        else if (c->options->rule == FP_OBS_GIVEN)
            keep_given(c, tile, begin, end, &b);
        finish(c, tile, begin, &b);
    }
}

/* ---- sweep with all rows competing: between two blocks the limit must be found ---- */

static void count_scores(const sweep_call *c, size_t tile, size_t cols, uint32_t *histogram)
{
    const float *s = tile_scores(c, tile);
    size_t rows = tile_rows(c, tile);
    for (size_t j = 0; j < cols; j++)
        for (size_t i = 0; i < rows; i++) {
            uint32_t bits;
            memcpy(&bits, &s[j * TILE + i], sizeof bits);
            histogram[bits >> 16 & (BINS - 1)]++;
        }
}

static void begin_tile(void *context, size_t tile, int worker)
{
    sweep_call *c = context;
    tile_buffers b = buffers_of(c, worker);
    prepare(c, tile, c->begin, &b);
    count_scores(c, tile, block_end(c, c->begin) - c->begin, b.histogram);
}

/* Ends the block under way and starts the next. */
static void advance_tile(void *context, size_t tile, int worker)
{
    sweep_call *c = context;
    tile_buffers b = buffers_of(c, worker);
    size_t end = block_end(c, c->begin);
    keep_above(c, tile, end - c->begin, c->tile_ties[tile], b.keep);
    finish(c, tile, c->begin, &b);
    if (end < c->cols) {
        prepare(c, tile, end, &b);
        count_scores(c, tile, block_end(c, end) - end, b.histogram);
    }
}

/* The limit below which k scores of the block lie, exactly: its upper 16 bits by the workers'
 * histograms, which become zero, the rest by selection among the scores that share them. */
static void find_limit(sweep_call *c, uint64_t k, size_t cols, int threads)
{
    uint32_t *histogram = buffers_of(c, 0).histogram;
    for (int worker = 1; worker < threads; worker++) {
        uint32_t *other = buffers_of(c, worker).histogram;
        for (size_t i = 0; i < BINS; i++)
            histogram[i] += other[i];
        memset(other, 0, BINS * sizeof *other);
    }
    uint64_t rank = k ? k - 1 : 0;
    uint32_t bin = 0;
    while (rank >= histogram[bin])
        rank -= histogram[bin++];
    memset(histogram, 0, BINS * sizeof *histogram);
    memset(c->tile_ties, 0, c->tiles * sizeof *c->tile_ties);
    c->limit = 0.0f;
    if (!k)
        return;

    size_t found = 0;
    for (size_t tile = 0; tile < c->tiles; tile++)
        for (size_t j = 0; j < cols; j++)
            for (size_t i = 0, rows = tile_rows(c, tile); i < rows; i++) {
                float s = tile_scores(c, tile)[j * TILE + i];
                uint32_t bits;
                memcpy(&bits, &s, sizeof bits);
                if ((bits >> 16 & (BINS - 1)) == bin)
                    c->candidates[found++] = (double)s;
            }
    c->limit = (float)fp_kth_smallest(c->candidates, found, (size_t)rank);
    size_t ties = (size_t)rank + 1;
    for (size_t i = 0; i < found; i++)
        ties -= c->candidates[i] < (double)c->limit;
    for (size_t tile = 0; ties && tile < c->tiles; tile++) {
        size_t rows = tile_rows(c, tile), equal = 0;
        for (size_t j = 0; j < cols; j++)
            for (size_t i = 0; i < rows; i++)
                equal += tile_scores(c, tile)[j * TILE + i] == c->limit;
        c->tile_ties[tile] = equal < ties ? equal : ties;
        ties -= c->tile_ties[tile];
    }
}

static void sweep_blocks(sweep_call *c, int threads)
{
    for (int worker = 0; worker < threads; worker++)
        memset(buffers_of(c, worker).histogram, 0, BINS * sizeof(uint32_t));
    fp_parallel_for(c->tiles, threads, begin_tile, c);
    for (size_t end; c->begin < c->cols; c->begin = end) {
        end = block_end(c, c->begin);
        uint64_t k = share(c->options->count, c->begin, end, c->cols);
        find_limit(c, k, end - c->begin, threads);
        fp_parallel_for(c->tiles, threads, advance_tile, c);
    }
}

static fp_status check_sweep(const fp_matrix *w, const fp_obs_options *o)
{
    if (!w || !o || !o->block_cols)
        return FP_ERR_ARGUMENT;
    if (w->cols > INT32_MAX / 2 || w->rows > INT32_MAX || o->block_cols > INT32_MAX / 2)
        return FP_ERR_OVERFLOW;
    uint64_t most = o->rule == FP_OBS_BLOCK ? (uint64_t)w->rows * w->cols : w->cols;
    if ((o->rule == FP_OBS_BLOCK || o->rule == FP_OBS_ROW) && o->count > most)
        return FP_ERR_RANGE;
    if (o->rule == FP_OBS_BLOCK && w->rows > UINT32_MAX / o->block_cols)
        return FP_ERR_OVERFLOW; /* histograms count in 32 bits */
    if (o->rule == FP_OBS_THRESHOLD && !(o->threshold >= 0))
        return FP_ERR_RANGE;
    if (o->rule == FP_OBS_NM && (o->n < 1 || o->n > o->m || o->m > 64))
        return FP_ERR_RANGE;
    return o->rule <= FP_OBS_GIVEN ? fp_matrix_check(w) : FP_ERR_ARGUMENT;
}

size_t fp_obs_sweep_work(size_t rows, size_t cols, const fp_obs_options *options, int threads)
{
    sweep_call c = {.options = options, .rows = rows, .cols = cols};
    return lay_out(&c, NULL, threads);
}

/* scale[i] = sqrt(x[i] / the largest), the largest returned; all 1 if x is NULL. */
static double scales(const double *x, size_t n, float *scale)
{
    double largest = 0;
    for (size_t i = 0; x && i < n; i++)
        largest = x[i] > largest ? x[i] : largest;
    for (size_t i = 0; i < n; i++)
        scale[i] = !x ? 1.0f : largest > 0 ? (float)sqrt(x[i] / largest) : 0.0f;
    return x ? largest : 1.0;
}

fp_status fp_obs_sweep(const fp_matrix *w, const float *a, const double *d,
                       const fp_obs_options *options, uint8_t *mask, float *out, int threads,
                       void *work, size_t work_bytes)
{
    fp_status status = check_sweep(w, options);
    if (status)
        return status;
    if (!w->rows || !w->cols)
        return FP_OK;
    if (!a || !d || !mask || !work ||
        work_bytes < fp_obs_sweep_work(w->rows, w->cols, options, threads))
        return FP_ERR_ARGUMENT;
    for (size_t j = 0; j < w->cols; j++)
        if (!(d[j] > 0) || isinf(d[j]))
            return FP_ERR_RANGE;
    for (size_t i = 0; options->row_weight && i < w->rows; i++)
        if (!(options->row_weight[i] >= 0) || isinf(options->row_weight[i]))
            return FP_ERR_RANGE;

    sweep_call c = {.w = w,
                    .a = a,
                    .options = options,
                    .mask = mask,
                    .out = out,
                    .rows = w->rows,
                    .cols = w->cols};
    threads = fp_clamp_threads(threads);
    lay_out(&c, work, threads);
    /* scores are roots of prices, in units of the largest scales: float32 holds any H */
    double unit =
        scales(d, w->cols, c.col_scale) * scales(options->row_weight, w->rows, c.row_scale);
    c.limit = unit > 0                 ? (float)sqrt(options->threshold / unit)
              : options->threshold > 0 ? INFINITY
                                       : 0.0f;
    if (options->rule != FP_OBS_GIVEN)
        memset(mask, 0, fp_mask_bytes(w->rows * w->cols));
    fp_parallel_for((c.cols + c.width - 1) / c.width, threads, invert_block, &c);
    if (options->rule == FP_OBS_BLOCK)
        sweep_blocks(&c, threads);
    else
        fp_parallel_for(c.tiles, threads, sweep_tile, &c);
    return FP_OK;
}
