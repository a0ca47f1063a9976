/* Calibration: streamed sums over rows of activations. Every sum runs in float64 over the rows in
 * order; items of work are parts of the output, so that no sum depends on the threads. */
#include <math.h>
#include <string.h>

#include "lapack.h"
#include "matrix.h"
#include "parallel.h"

enum {
    PIECE = 256,     /* columns read at a time where a row need not be kept whole */
    PARTS = 256,     /* of the rows, when they are checked */
    TILE = 192,      /* rows and columns of the second moment that one item owns */
    CHUNK_ROWS = 512 /* rows converted at a time */
};

/* Of |x| sqrt(weight): the square of anything below fits, as does a sum of such squares. */
static const double LARGEST = 1e150;

static const double ONE = 1.0;

/* Columns first .. of m, at most PIECE of them. */
static fp_matrix columns_from(const fp_matrix *m, size_t first)
{
    fp_matrix piece = *m;
    piece.data = (const char *)m->data + (ptrdiff_t)first * m->col_stride;
    piece.cols = m->cols - first < PIECE ? m->cols - first : PIECE;
    return piece;
}

/* ---- what may be added ---- */

typedef struct check_call {
    const fp_matrix *x;
    const double *weights;
    size_t part;       /* rows */
    size_t bad[PARTS]; /* first bad row of each part, x->rows if none */
} check_call;

static int row_is_sound(const fp_matrix *x, size_t row, double root)
{
    double buffer[PIECE];
    for (size_t first = 0; first < x->cols; first += PIECE) {
        fp_matrix piece = columns_from(x, first);
        int sound = 1;
        fp_matrix_load(&piece, row, 1, buffer, 0, 1);
        for (size_t j = 0; j < piece.cols; j++)
            sound &= fabs(buffer[j]) * root <= LARGEST; /* false for NaN */
        if (!sound)
            return 0;
    }
    return 1;
}

static void check_part(void *context, size_t item, int worker)
{
    check_call *c = context;
    size_t begin = item * c->part;
    size_t end = c->x->rows - begin < c->part ? c->x->rows : begin + c->part;
    (void)worker;
    c->bad[item] = c->x->rows;
    for (size_t i = begin; i < end; i++) {
        double weight = c->weights ? c->weights[i] : 1.0;
        if (weight == 0)
            continue;
        if (!(weight > 0) || !(weight <= LARGEST) || !row_is_sound(c->x, i, sqrt(weight))) {
            c->bad[item] = i;
            return;
        }
    }
}

fp_status fp_rows_check(const fp_matrix *x, const double *weights, size_t *bad, int threads)
{
    if (!x || !bad)
        return FP_ERR_ARGUMENT;
    fp_status status = fp_matrix_check(x);
    if (status)
        return status;
    check_call c = {.x = x, .weights = weights, .part = x->rows / PARTS + 1};
    size_t parts = x->rows / c.part + (x->rows % c.part != 0);
    fp_parallel_for(parts, threads, check_part, &c);
    *bad = x->rows;
    for (size_t i = parts; i-- > 0;)
        if (c.bad[i] < x->rows)
            *bad = c.bad[i];
    return *bad < x->rows ? FP_ERR_VALUE : FP_OK;
}

/* What both kinds of sums begin with. */
static fp_status begin(const fp_matrix *x, const double *weights, fp_row_total *total, int threads)
{
    size_t bad;
    fp_status status = total ? fp_rows_check(x, weights, &bad, threads) : FP_ERR_ARGUMENT;
    if (status)
        return status;
    *total = (fp_row_total){0};
    for (size_t i = 0; i < x->rows; i++) {
        double weight = weights ? weights[i] : 1.0;
        total->weight += weight;
        total->rows += weight > 0;
    }
    return FP_OK;
}

/* ---- second moments ---- */

typedef struct moments_call {
    const fp_matrix *x;
    double *second, *sum;
    double *chunk; /* rows x cols: sqrt(weight) x, rows of weight 0 left out */
    double root[CHUNK_ROWS];
    size_t index[CHUNK_ROWS]; /* of the chunk's rows in x */
    size_t rows;              /* of the chunk */
    int last;                 /* no chunk follows */
} moments_call;

static void load_row(void *context, size_t item, int worker)
{
    moments_call *c = context;
    double *row = c->chunk + item * c->x->cols;
    (void)worker;
    fp_matrix_load(c->x, c->index[item], 1, row, 0, 1);
    if (c->root[item] != 1.0)
        for (size_t j = 0; j < c->x->cols; j++)
            row[j] *= c->root[item];
}

/* Item (i, j), j <= i, owns that tile and its mirror; diagonal ones also the sum of their columns.
 * A row-major tile is the column-major transposed one. */
static void add_tile(void *context, size_t item, int worker)
{
    moments_call *c = context;
    size_t i = 0, j = item, d = c->x->cols;
    (void)worker;
    for (; j > i; i++)
        j -= i + 1;
    size_t top = i * TILE, left = j * TILE;
    int32_t height = (int32_t)(d - top < TILE ? d - top : TILE);
    int32_t width = (int32_t)(d - left < TILE ? d - left : TILE);
    int32_t ld = (int32_t)d, k = (int32_t)c->rows;
    double *tile = c->second + top * d + left;
    if (i != j) {
        fp_dgemm("N", "T", &width, &height, &k, &ONE, c->chunk + left, &ld, c->chunk + top, &ld,
                 &ONE, tile, &ld, 1, 1);
    } else {
        fp_dsyrk("U", "N", &height, &k, &ONE, c->chunk + top, &ld, &ONE, tile, &ld, 1, 1);
        for (size_t t = 0; t < c->rows; t++)
            for (size_t a = top; a < top + (size_t)height; a++)
                c->sum[a] += c->root[t] * c->chunk[t * d + a];
    }
    if (!c->last)
        return;
    for (size_t a = top; a < top + (size_t)height; a++)
        for (size_t b = left; b < left + (size_t)width && b < a; b++)
            c->second[b * d + a] = c->second[a * d + b];
}

static size_t chunk_rows(const fp_matrix *x)
{
    return x->rows < CHUNK_ROWS ? x->rows : CHUNK_ROWS;
}

size_t fp_moments_work(const fp_matrix *x)
{
    if (!x || x->cols > INT32_MAX / CHUNK_ROWS)
        return 0;
    size_t bytes = chunk_rows(x) * x->cols * sizeof(double);
    return bytes ? bytes : 1;
}

fp_status fp_moments_update(const fp_matrix *x, const double *weights, double *second, double *sum,
                            fp_row_total *total, int threads, void *work, size_t work_bytes)
{
    size_t needed = fp_moments_work(x);
    if (x && !needed)
        return FP_ERR_OVERFLOW;
    if (!x || !second || !sum || !work || work_bytes < needed)
        return FP_ERR_ARGUMENT;
    fp_status status = begin(x, weights, total, threads);
    if (status || !total->rows)
        return status;
    moments_call c = {.x = x, .second = second, .sum = sum, .chunk = work};
    size_t tiles = x->cols / TILE + (x->cols % TILE != 0), left = total->rows;
    for (size_t i = 0; left; i++) {
        double weight = weights ? weights[i] : 1.0;
        if (weight == 0)
            continue;
        c.root[c.rows] = sqrt(weight);
        c.index[c.rows++] = i;
        c.last = !--left;
        if (c.rows < CHUNK_ROWS && !c.last)
            continue;
        fp_parallel_for(c.rows, threads, load_row, &c);
        fp_parallel_for(tiles * (tiles + 1) / 2, threads, add_tile, &c);
        c.rows = 0;
    }
    return FP_OK;
}

/* ---- mean squares ---- */

typedef struct squares_call {
    const fp_matrix *x;
    const double *weights;
    double *squares;
} squares_call;

static void add_squares(void *context, size_t item, int worker)
{
    squares_call *c = context;
    fp_matrix piece = columns_from(c->x, item * PIECE);
    double sum[PIECE] = {0}, buffer[PIECE];
    (void)worker;
    for (size_t i = 0; i < piece.rows; i++) {
        double weight = c->weights ? c->weights[i] : 1.0;
        if (weight == 0)
            continue;
        fp_matrix_load(&piece, i, 1, buffer, 0, 1);
        for (size_t j = 0; j < piece.cols; j++)
            sum[j] += weight * (buffer[j] * buffer[j]);
    }
    for (size_t j = 0; j < piece.cols; j++)
        c->squares[item * PIECE + j] += sum[j];
}

fp_status fp_square_sums(const fp_matrix *x, const double *weights, double *squares,
                         fp_row_total *total, int threads)
{
    if (!squares)
        return FP_ERR_ARGUMENT;
    fp_status status = begin(x, weights, total, threads);
    if (status)
        return status;
    squares_call c = {x, weights, squares};
    fp_parallel_for(x->cols / PIECE + (x->cols % PIECE != 0), threads, add_squares, &c);
    return FP_OK;
}

/* ---- use of embedding rows ---- */

fp_status fp_count_rows(const int64_t *ids, size_t n, const double *weights, double *counts,
                        size_t rows, double *weight)
{
    if ((n && !ids) || (rows && !counts) || !weight)
        return FP_ERR_ARGUMENT;
    *weight = 0;
    for (size_t i = 0; i < n; i++) {
        double own = weights ? weights[i] : 1.0;
        if (!(own >= 0) || !(own <= LARGEST))
            return FP_ERR_VALUE;
        if (own > 0 && (ids[i] < 0 || (uint64_t)ids[i] >= rows))
            return FP_ERR_RANGE;
    }
    for (size_t i = 0; i < n; i++) {
        double own = weights ? weights[i] : 1.0;
        if (own > 0)
            counts[ids[i]] += own;
        *weight += own;
    }
    return FP_OK;
}
