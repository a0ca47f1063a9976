/* Forward propagation pruning: exact least squares of the kept weights, and exchanges of kept
 * weights for removed ones that lower its error. */
#include <math.h>
#include <string.h>

#include "cholesky.h"
#include "lapack.h"
#include "matrix.h"
#include "parallel.h"
#include "work.h"

enum { TILE = 96 }; /* rows, a multiple of 8: no byte of a mask belongs to two tiles */
static const double ONE = 1.0, MINUS = -1.0, ZERO = 0.0;

/* One worker's buffers; tiles are TILE x cols. */
typedef struct tile_buffers {
    double *given;     /* rows of rhs, or without one of w */
    double *product;   /* given times the inverse of H, or without rhs times H */
    double *solution;  /* the rows as they come out */
    double *residual;  /* rhs - solution H */
    double *system;    /* of the kept or of the removed columns, whichever are fewer */
    double *right;     /* the right-hand sides of up to TILE rows of one support */
    double *trial;     /* a row */
    double *price;     /* of a row's columns: kept ones' loss, removed ones' gain, if exchanged */
    int32_t *out, *in; /* columns to be exchanged, in pairs */
    int32_t *index;    /* the columns of the system, in ascending order */
} tile_buffers;

typedef struct refit_call {
    const fp_matrix *w;
    uint8_t *mask;
    const double *h, *rhs;
    void *out;
    fp_dtype out_dtype;
    size_t rows, cols;
    unsigned rounds;
    size_t group;
    size_t largest;           /* order of a system */
    int any_removed;          /* some row solves for what it removes */
    int with_inverse;         /* which takes the inverse of H, as do exchanges */
    double *inverse, *factor; /* cols x cols */
    double *loss;             /* removing kept x_j costs about loss_j x_j^2 */
    char *buffers;
    size_t stride;
    fp_status *status; /* per tile */
} refit_call;

static int kept(const uint8_t *mask, size_t bit)
{
    return mask[bit >> 3] >> (bit & 7) & 1;
}

static size_t count_row(const uint8_t *mask, size_t row, size_t cols)
{
    size_t k = 0, bit = row * cols, end = bit + cols;
    while (bit < end && bit & 7)
        k += (size_t)kept(mask, bit++);
    for (; bit + 8 <= end; bit += 8)
        k += (size_t)__builtin_popcount(mask[bit >> 3]);
    while (bit < end)
        k += (size_t)kept(mask, bit++);
    return k;
}

/* A row keeps k of its columns: is the system that of the removed ones? */
static int by_removed(const refit_call *c, size_t k)
{
    return k > c->cols / 2;
}

static void plan(refit_call *c, const uint8_t *mask)
{
    for (size_t i = 0; i < c->rows; i++) {
        size_t k = count_row(mask, i, c->cols), removed = c->cols - k;
        size_t order = by_removed(c, k) ? removed : k;
        c->largest = order > c->largest ? order : c->largest;
        c->any_removed |= by_removed(c, k) && (removed || c->rhs);
    }
    c->with_inverse = c->any_removed || c->rounds;
}

static tile_buffers lay_out_worker(const refit_call *c, char *base, size_t *bytes)
{
    tile_buffers b;
    size_t used = 0, tile = TILE * c->cols, row = c->rounds ? c->cols : 0;
    b.given = fp_take(base, &used, tile, sizeof(double));
    b.product = fp_take(base, &used, tile, sizeof(double));
    b.solution = fp_take(base, &used, tile, sizeof(double));
    b.residual = fp_take(base, &used, c->rounds ? tile : 0, sizeof(double));
    b.system = fp_take(base, &used, c->largest * c->largest, sizeof(double));
    b.right = fp_take(base, &used, c->largest * TILE, sizeof(double));
    b.trial = fp_take(base, &used, row, sizeof(double));
    b.price = fp_take(base, &used, row, sizeof(double));
    b.out = fp_take(base, &used, row, sizeof(int32_t));
    b.in = fp_take(base, &used, row, sizeof(int32_t));
    b.index = fp_take(base, &used, c->largest, sizeof(int32_t));
    *bytes = used;
    return b;
}

static size_t lay_out(refit_call *c, char *base, int threads)
{
    size_t used = 0, square = c->with_inverse ? c->cols * c->cols : 0;
    c->inverse = fp_take(base, &used, square, sizeof(double));
    c->factor = fp_take(base, &used, square, sizeof(double));
    c->loss = fp_take(base, &used, c->rounds ? c->cols : 0, sizeof(double));
    c->status = fp_take(base, &used, (c->rows + TILE - 1) / TILE, sizeof(fp_status));
    lay_out_worker(c, NULL, &c->stride);
    c->buffers = base ? base + used : NULL;
    return used + (size_t)fp_clamp_threads(threads) * c->stride;
}

/* ---- least squares ---- */

static int same_support(const refit_call *c, size_t row, size_t other)
{
    size_t a = row * c->cols, b = other * c->cols;
    if (!(c->cols & 7))
        return !memcmp(c->mask + a / 8, c->mask + b / 8, c->cols / 8);
    for (size_t j = 0; j < c->cols; j++)
        if (kept(c->mask, a + j) != kept(c->mask, b + j))
            return 0;
    return 1;
}

/* Factors the system of b->index out of `matrix` (H or its inverse). */
static fp_status factor_system(const refit_call *c, const double *matrix, int32_t order,
                               const tile_buffers *b)
{
    for (int32_t j = 0; j < order; j++) {
        const double *source = matrix + (size_t)b->index[j] * c->cols;
        double *column = b->system + (size_t)j * (size_t)order;
        for (int32_t i = j; i < order; i++)
            column[i] = source[b->index[i]];
    }
    int32_t info;
    fp_dpotrf("L", &order, b->system, &order, &info, 1);
    for (int32_t i = 0; !info && i < order; i++) /* a NaN may pass dpotrf by */
        info = !(b->system[(size_t)i * ((size_t)order + 1)] > 0);
    return info ? FP_ERR_LAPACK : FP_OK;
}

/* x (count x cols) = the best weights of rows row .. row + count, which share a support. `right`:
 * their right-hand sides or, for a system of removed columns, unconstrained solutions. */
static fp_status solve(const refit_call *c, size_t row, size_t count, int removed,
                       const double *right, double *x, const tile_buffers *b)
{
    int32_t order = 0, runs = (int32_t)count, info;
    for (size_t j = 0; j < c->cols; j++)
        if (kept(c->mask, row * c->cols + j) != removed)
            b->index[order++] = (int32_t)j;
    fp_status status = order ? factor_system(c, removed ? c->inverse : c->h, order, b) : FP_OK;
    if (status)
        return status;
    for (size_t i = 0; i < count; i++)
        for (int32_t j = 0; j < order; j++)
            b->right[i * (size_t)order + (size_t)j] = right[i * c->cols + (size_t)b->index[j]];
    if (order)
        fp_dpotrs("L", &order, &runs, b->system, &order, b->right, &order, &info, 1);
    for (size_t i = 0; i < count; i++, x += c->cols) {
        const double *solved = b->right + i * (size_t)order;
        if (removed)
            memcpy(x, right + i * c->cols, c->cols * sizeof *x);
        else
            memset(x, 0, c->cols * sizeof *x);
        /* of all x + y Hinv the cheapest that is zero in the removed columns */
        for (int32_t j = 0; removed && j < order; j++) {
            const double *direction = c->inverse + (size_t)b->index[j] * c->cols;
            for (size_t l = 0; l < c->cols; l++)
                x[l] -= solved[j] * direction[l];
        }
        for (int32_t j = 0; j < order; j++)
            x[b->index[j]] = removed ? 0.0 : solved[j];
    }
    return FP_OK;
}

/* y = alpha x M + beta y for rows of a tile and a symmetric M. */
static void multiply(const refit_call *c, size_t rows, double alpha, const double *x,
                     const double *matrix, double beta, double *y)
{
    int32_t n = (int32_t)c->cols, m = (int32_t)rows;
    fp_dgemm("N", "N", &n, &m, &n, &alpha, matrix, &n, x, &n, &beta, y, &n, 1, 1);
}

/* ---- exchanges ---- */

/* Pairs of columns such that the first outgoing one loses less than the first incoming one gains,
 * and so on. Returns how many. */
static size_t pair_anywhere(const refit_call *c, size_t row, tile_buffers *b)
{
    const uint8_t *mask = c->mask;
    size_t bit = row * c->cols, outs = 0, ins = 0, pairs = 0;
    double cheapest = INFINITY, dearest = 0.0;
    for (size_t j = 0; j < c->cols; j++) {
        if (kept(mask, bit + j))
            cheapest = fmin(cheapest, b->price[j]);
        else
            dearest = fmax(dearest, b->price[j]);
    }
    for (size_t j = 0; j < c->cols; j++) { /* the others are in no pair */
        if (kept(mask, bit + j) && b->price[j] < dearest)
            b->out[outs++] = (int32_t)j;
        else if (!kept(mask, bit + j) && b->price[j] > cheapest)
            b->in[ins++] = (int32_t)j;
    }
    for (; pairs < outs && pairs < ins; pairs++) { /* few: selection sort */
        size_t first = pairs, best = pairs;
        for (size_t i = pairs + 1; i < outs; i++)
            first = b->price[b->out[i]] < b->price[b->out[first]] ? i : first;
        for (size_t i = pairs + 1; i < ins; i++)
            best = b->price[b->in[i]] > b->price[b->in[best]] ? i : best;
        int32_t out = b->out[first], in = b->in[best];
        if (!(b->price[in] > b->price[out]))
            break;
        b->out[first] = b->out[pairs];
        b->in[best] = b->in[pairs];
        b->out[pairs] = out;
        b->in[pairs] = in;
    }
    return pairs;
}

/* The same within each group of columns, at most one pair of each, the best first. */
static size_t pair_in_groups(const refit_call *c, size_t row, tile_buffers *b)
{
    size_t bit = row * c->cols, pairs = 0;
    for (size_t begin = 0; begin < c->cols; begin += c->group) {
        size_t end = c->cols - begin < c->group ? c->cols : begin + c->group;
        int32_t out = -1, in = -1;
        for (size_t j = begin; j < end; j++) {
            if (kept(c->mask, bit + j))
                out = out < 0 || b->price[j] < b->price[out] ? (int32_t)j : out;
            else
                in = in < 0 || b->price[j] > b->price[in] ? (int32_t)j : in;
        }
        if (out < 0 || in < 0 || !(b->price[in] > b->price[out]))
            continue;
        size_t i = pairs++;
        double profit = b->price[in] - b->price[out];
        for (; i && b->price[b->in[i - 1]] - b->price[b->out[i - 1]] < profit; i--) {
            b->out[i] = b->out[i - 1];
            b->in[i] = b->in[i - 1];
        }
        b->out[i] = out;
        b->in[i] = in;
    }
    return pairs;
}

static void exchange(const refit_call *c, size_t row, size_t pairs, const tile_buffers *b)
{
    for (size_t i = 0; i < pairs; i++) {
        size_t out = row * c->cols + (size_t)b->out[i], in = row * c->cols + (size_t)b->in[i];
        c->mask[out >> 3] ^= (uint8_t)(1u << (out & 7));
        c->mask[in >> 3] ^= (uint8_t)(1u << (in & 7));
    }
}

static double dot(const double *x, const double *y, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

/* One round for one row: as many exchanges as promise to pay, times *share, which is halved when
 * together they do not and everything stays as it was. */
static fp_status improve_row(const refit_call *c, size_t row, int removed, const double *target,
                             const double *right, const double *residual, double *solution,
                             double *share, tile_buffers *b)
{
    for (size_t j = 0; j < c->cols; j++) /* gains without the other columns' help: a lower bound */
        b->price[j] = kept(c->mask, row * c->cols + j)
                          ? solution[j] * solution[j] * c->loss[j]
                          : residual[j] * residual[j] / c->h[j * (c->cols + 1)];
    size_t pairs = c->group ? pair_in_groups(c, row, b) : pair_anywhere(c, row, b);
    pairs = (size_t)ceil(*share * (double)pairs);
    if (!pairs)
        return FP_OK;
    exchange(c, row, pairs, b);
    fp_status status = solve(c, row, 1, removed, right, b->trial, b);
    if (status)
        return status;
    /* the error is a constant less rhs x^T */
    double before = dot(target, solution, c->cols), after = dot(target, b->trial, c->cols);
    if (after > before + 1e-12 * fabs(before)) {
        memcpy(solution, b->trial, c->cols * sizeof *solution);
    } else {
        exchange(c, row, pairs, b); /* back again */
        *share = pairs > 1 ? *share / 2 : 0.0;
    }
    return FP_OK;
}

/* ---- tiles of rows ---- */

static void write_rows(const refit_call *c, size_t first, size_t rows, const double *x)
{
    size_t begin = first * c->cols, n = rows * c->cols;
    if (c->out_dtype == FP_F64) {
        memcpy((double *)c->out + begin, x, n * sizeof *x);
        return;
    }
    for (size_t i = 0; i < n; i++)
        ((float *)c->out)[begin + i] = (float)x[i];
}

static void refit_tile(void *context, size_t tile, int worker)
{
    refit_call *c = context;
    size_t bytes, cols = c->cols, first = tile * TILE;
    size_t rows = c->rows - first < TILE ? c->rows - first : TILE;
    tile_buffers b = lay_out_worker(c, c->buffers + (size_t)worker * c->stride, &bytes);
    int removed[TILE], any = 0;
    double share[TILE];
    fp_status *status = &c->status[tile];
    *status = FP_OK;
    for (size_t i = 0; i < rows; i++) {
        size_t k = count_row(c->mask, first + i, cols);
        removed[i] = by_removed(c, k);
        share[i] = 1.0;
        any |= k && (c->rounds || (c->rhs != NULL) == removed[i]);
    }
    if (c->rhs)
        memcpy(b.given, c->rhs + first * cols, rows * cols * sizeof *b.given);
    else
        fp_matrix_load(c->w, first, rows, b.given, cols, 1);
    if (any && (!c->rhs || c->any_removed))
        multiply(c, rows, ONE, b.given, c->rhs ? c->inverse : c->h, ZERO, b.product);
    const double *target = c->rhs ? b.given : b.product;
    const double *unconstrained = c->rhs ? b.product : b.given;

    for (size_t i = 0, count; i < rows && !*status; i += count) {
        count = 1;
        while (i + count < rows && same_support(c, first + i, first + i + count))
            count++;
        *status =
            solve(c, first + i, count, removed[i], (removed[i] ? unconstrained : target) + i * cols,
                  b.solution + i * cols, &b);
    }
    for (unsigned round = 0; round < c->rounds && !*status; round++) {
        memcpy(b.residual, target, rows * cols * sizeof *b.residual);
        multiply(c, rows, MINUS, b.solution, c->h, ONE, b.residual);
        for (size_t i = 0, at = 0; i < rows && !*status; i++, at += cols)
            *status = improve_row(c, first + i, removed[i], target + at,
                                  (removed[i] ? unconstrained : target) + at, b.residual + at,
                                  b.solution + at, &share[i], &b);
    }
    if (!*status)
        write_rows(c, first, rows, b.solution);
}

size_t fp_refit_work(const uint8_t *mask, const double *rhs, size_t rows, size_t cols,
                     unsigned rounds, int threads)
{
    refit_call c = {.rhs = rhs, .rows = rows, .cols = cols, .rounds = rounds};
    plan(&c, mask);
    return lay_out(&c, NULL, threads);
}

fp_status fp_refit(const fp_matrix *w, uint8_t *mask, const double *h, const double *rhs,
                   unsigned rounds, size_t group, void *out, fp_dtype out_dtype, int threads,
                   void *work, size_t work_bytes)
{
    if (!w)
        return FP_ERR_ARGUMENT;
    fp_status status = fp_matrix_check(w);
    if (status || !w->rows || !w->cols)
        return status;
    if (out_dtype != FP_F32 && out_dtype != FP_F64)
        return FP_ERR_DTYPE;
    if (w->cols > INT32_MAX / 2)
        return FP_ERR_OVERFLOW;
    if (!mask || !h || !out || !work)
        return FP_ERR_ARGUMENT;
    refit_call c = {.w = w,
                    .mask = mask,
                    .h = h,
                    .rhs = rhs,
                    .out = out,
                    .out_dtype = out_dtype,
                    .rows = w->rows,
                    .cols = w->cols,
                    .rounds = rounds,
                    .group = group};
    plan(&c, mask);
    threads = fp_clamp_threads(threads);
    if (work_bytes < lay_out(&c, work, threads))
        return FP_ERR_ARGUMENT;
    if (c.with_inverse) {
        memcpy(c.factor, h, c.cols * c.cols * sizeof *h);
        status = fp_cholesky(c.factor, c.cols, threads);
        if (status)
            return status;
        fp_cholesky_inverse(c.factor, c.cols, c.inverse, threads);
    }
    /* between H_jj, no other column makes up for it, and 1 / Hinv_jj, all others do: their
     * geometric mean tells about as well as the exact price, which takes an inverse per row */
    for (size_t j = 0; c.rounds && j < c.cols; j++)
        c.loss[j] = sqrt(h[j * (c.cols + 1)] / c.inverse[j * (c.cols + 1)]);
    size_t tiles = (c.rows + TILE - 1) / TILE;
    fp_parallel_for(tiles, threads, refit_tile, &c);
    for (size_t tile = 0; tile < tiles && !status; tile++)
        status = c.status[tile];
    return status;
}
