/* The methods on odd shapes, against plain definitions, under the sanitizers. Every workspace has
 * exactly the size that its _work function asked for, with a canary behind it for what LAPACK might
 * write. */
#include <math.h>

#include "foldprune.h"
#include "lapack.h"
#include "methods_testing.h"

enum { CANARY = 64 };

static void *workspace(size_t bytes)
{
    char *p = exactly(bytes + CANARY);
    memset(p + bytes, 0x5a, CANARY);
    return p;
}

static void release(void *work, size_t bytes)
{
    const char *p = work;
    int intact = 1;
    for (size_t i = 0; i < CANARY; i++)
        intact &= p[bytes + i] == 0x5a;
    CHECK(intact);
    free(work);
}

static int bit(const uint8_t *mask, size_t i)
{
    return mask[i >> 3] >> (i & 7) & 1;
}

/* ---- selection and masks ---- */

static void *random_matrix(fp_dtype dtype, size_t n, int coarse)
{
    void *x = exactly(n * fp_dtype_size(dtype));
    for (size_t i = 0; i < n; i++) {
        double value = uniform();
        if (coarse)
            value = floor(value * 4) / 4; /* many ties and zeros */
        float single = (float)value;
        uint32_t bits;
        memcpy(&bits, &single, sizeof bits);
        if (dtype == FP_F64)
            ((double *)x)[i] = value;
        else if (dtype == FP_F32)
            ((float *)x)[i] = single;
        else if (dtype == FP_BF16)
            ((uint16_t *)x)[i] = (uint16_t)(bits >> 16);
        else /* a half with exponent bits of its own: any finite pattern will do */
            ((uint16_t *)x)[i] = (uint16_t)((bits >> 31) << 15 | (bits >> 13 & 0x3ff) |
                                            (coarse ? 0x3800 : (bits & 0xf) << 10));
    }
    return x;
}

static double value_of(const fp_scored *t, size_t i)
{
    if (t->dtype == FP_F64)
        return fabs(((const double *)t->x)[i]);
    if (t->dtype == FP_F32)
        return fabs((double)((const float *)t->x)[i]);
    uint16_t half = ((const uint16_t *)t->x)[i];
    if (t->dtype == FP_BF16) {
        uint32_t bits = (uint32_t)half << 16;
        float single;
        memcpy(&single, &bits, sizeof single);
        return fabs((double)single);
    }
    int exponent = half >> 10 & 0x1f, mantissa = half & 0x3ff;
    return exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
}

/* How many elements must leave before element i of t: smaller ones, and equal ones before it. */
static size_t rank_of(const fp_scored *t, size_t i, size_t begin, size_t end)
{
    size_t rank = 0;
    double own = value_of(t, i);
    for (size_t j = begin; j < end; j++) {
        double other = value_of(t, j);
        rank += other < own || (other == own && j < i);
    }
    return rank;
}

static void test_selection(fp_dtype dtype, size_t rows, size_t cols, int coarse, int threads)
{
    size_t n = rows * cols;
    const fp_kernels *kernels = fp_kernels_default();
    fp_scored t = {random_matrix(dtype, n, coarse), dtype, rows, cols, 1.0, NULL};
    uint8_t *mask = exactly(fp_mask_bytes(n));
    size_t select_bytes = fp_select_work(threads), mask_bytes = fp_mask_work(&t);
    void *select_work = workspace(select_bytes), *mask_work = workspace(mask_bytes);
    for (size_t step = 0; step <= 4; step++) {
        size_t k = n * step / 4;
        fp_pack_plan plan;
        fp_threshold threshold;
        uint64_t used;
        CHECK(!fp_select(kernels, &t, 1, k, &threshold, threads, select_work, select_bytes));
        CHECK(!fp_mask_threshold(kernels, &t, threshold, mask, &used, threads, mask_work,
                                 mask_bytes));
        int right = 1;
        for (size_t i = 0; i < n; i++)
            right &= bit(mask, i) == (rank_of(&t, i, 0, n) >= k);
        CHECK(right);
        CHECK(!fp_pack_prepare(kernels, mask, n, &plan, threads) && plan.kept == n - k);

        void *values = exactly(plan.kept * fp_dtype_size(dtype)),
             *back = exactly(n * fp_dtype_size(dtype));
        CHECK(!fp_pack(kernels, &plan, mask, t.x, fp_dtype_size(dtype), values, threads));
        CHECK(!fp_unpack(kernels, &plan, mask, values, fp_dtype_size(dtype), back, threads));
        fp_scored unpacked = t;
        unpacked.x = back;
        for (size_t i = 0; i < n; i++)
            right &= value_of(&unpacked, i) == (bit(mask, i) ? value_of(&t, i) : 0.0);
        CHECK(right);
        CHECK(fp_pack(kernels, &plan, mask, t.x, 3, values, threads) == FP_ERR_DTYPE);
        if (n % 8) {
            mask[n / 8] |= 0x80;
            CHECK(fp_pack_prepare(kernels, mask, n, &plan, threads) == FP_ERR_CORRUPT);
        }
        free(values);
        free(back);
    }
    CHECK(fp_select(kernels, &t, 1, n + 1, &(fp_threshold){0}, threads, select_work,
                    select_bytes) == FP_ERR_RANGE);

    size_t k = cols / 2, bytes = fp_mask_rows_work(&t, threads);
    void *work = workspace(bytes);
    CHECK(!fp_mask_rows(&t, k, mask, threads, work, bytes));
    int right = 1;
    for (size_t i = 0; i < n; i++)
        right &= bit(mask, i) == (rank_of(&t, i, i / cols * cols, (i / cols + 1) * cols) >= k);
    CHECK(right);
    release(work, bytes);

    CHECK(!fp_mask_nm(&t, 2, 4, mask, threads));
    for (size_t row = 0; row < rows; row++)
        for (size_t g = 0; g < cols; g += 4) {
            size_t size = cols - g < 4 ? cols - g : 4, count = 0;
            for (size_t j = 0; j < size; j++)
                count += (size_t)bit(mask, row * cols + g + j);
            right &= count == (size < 2 ? size : 2);
        }
    CHECK(right);

    size_t grid_rows = (rows + 2) / 3, grid_cols = (cols + 4) / 5;
    float *scores = exactly(grid_rows * grid_cols * sizeof *scores);
    uint8_t *blocks = exactly(fp_mask_bytes(grid_rows * grid_cols));
    CHECK(!fp_block_scores(&t, 3, 5, scores, threads));
    memset(blocks, 0, fp_mask_bytes(grid_rows * grid_cols));
    for (size_t i = 0; i < grid_rows * grid_cols; i += 2)
        blocks[i >> 3] |= (uint8_t)(1u << (i & 7));
    CHECK(!fp_mask_blocks(blocks, rows, cols, 3, 5, mask, threads));
    for (size_t i = 0; i < n; i++)
        right &= bit(mask, i) == bit(blocks, i / cols / 3 * grid_cols + i % cols / 5);
    CHECK(right);

    release(select_work, select_bytes);
    release(mask_work, mask_bytes);
    free(scores);
    free(blocks);
    free(mask);
    free((void *)(uintptr_t)t.x);
}

/* ---- folds ---- */

typedef struct fold_case {
    size_t heads, groups, head_dim, n, d; /* n and d without bias and extra column */
    int bias, extra, scaled, repeated, factored;
} fold_case;

static double *numbers(size_t n)
{
    double *x = exactly(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = uniform();
    return x;
}

static fp_matrix view(const double *x, size_t rows, size_t cols)
{
    return (fp_matrix){x, FP_F64, rows, cols, (ptrdiff_t)(cols * sizeof *x), sizeof *x};
}

/* Largest error of M = left^T right over the group's heads, against the product of the originals.
 */
static double product_error(const fp_heads *h, const fp_fold_out *out, const double *l,
                            const double *lb, const double *r, const double *re)
{
    size_t n = h->left.cols + (lb != NULL), de = h->right.cols + (re != NULL),
           per = h->heads / h->groups;
    double worst = 0;
    for (size_t i = 0; i < h->heads; i++)
        for (size_t a = 0; a < n; a++)
            for (size_t b = 0; b < de; b++) {
                double want = 0, have = 0;
                size_t j = i / per;
                for (size_t t = 0; t < h->head_dim; t++) {
                    size_t row = i * h->head_dim + t, other = j * h->head_dim + t;
                    double left = a < h->left.cols ? l[row * h->left.cols + a] : lb[row];
                    double right = b < h->right.cols ? r[other * h->right.cols + b] : re[other];
                    want += left * right;
                }
                for (size_t t = 0; t < out->capacity; t++)
                    have += out->left[(i * out->capacity + t) * n + a] *
                            out->right[(j * out->capacity + t) * de + b];
                worst = fmax(worst, fabs(want - have));
            }
    return worst;
}

static void test_fold(fold_case c, int threads)
{
    size_t rows = c.heads * c.head_dim, other = c.groups * c.head_dim;
    double *l = numbers(rows * c.n), *lb = c.bias ? numbers(rows) : NULL;
    double *r = numbers(other * c.d), *re = c.extra ? numbers(other) : NULL;
    double *ls = c.scaled ? numbers(c.n) : NULL, *rs = c.scaled ? numbers(c.d) : NULL;
    for (size_t i = 0; ls && i < c.n; i++)
        ls[i] = 1.5 + ls[i];
    for (size_t i = 0; rs && i < c.d; i++)
        rs[i] = 1.5 + rs[i];
    for (size_t i = 0; c.repeated && i < other;
         i++) /* every second row of a head repeats the first */
        if (i % c.head_dim % 2)
            memcpy(r + i * c.d, r + i / c.head_dim * c.head_dim * c.d, c.d * sizeof *r);
    size_t ln = c.n + (size_t)c.bias;
    double *lf = c.factored ? numbers(ln * ln) : NULL, *rf = c.factored ? numbers(c.d * c.d) : NULL;
    fp_heads h = {.left = view(l, rows, c.n),
                  .right = view(r, other, c.d),
                  .heads = c.heads,
                  .groups = c.groups,
                  .head_dim = c.head_dim,
                  .left_scale = ls,
                  .right_scale = rs,
                  .left_factor = lf,
                  .right_factor = rf};
    if (lb)
        h.left_bias = view(lb, rows, 1);
    if (re)
        h.right_extra = view(re, other, 1);

    size_t bytes = fp_fold_work(&h, threads), n = c.n + (size_t)c.bias, de = c.d + (size_t)c.extra;
    CHECK(bytes > 0);
    void *work = workspace(bytes);
    fp_fold_out out = {.left = exactly(c.heads * c.head_dim * n * sizeof(double)),
                       .right = exactly(c.groups * c.head_dim * de * sizeof(double)),
                       .pivots = exactly(c.groups * c.head_dim * sizeof(int32_t)),
                       .ranks = exactly(c.groups * sizeof(int32_t)),
                       .error = exactly(c.groups * sizeof(double)),
                       .energy = exactly(c.groups * sizeof(double)),
                       .capacity = c.head_dim};

    /* lossless: the same product, the identity in the pivots */
    CHECK(!fp_irc_apply(&h, NULL, &out, threads, work, bytes));
    if (!c.repeated || !c.extra) /* repeated rows with different extras have no exact fold */
        CHECK(product_error(&h, &out, l, lb, r, re) < 1e-9);
    size_t limit = c.head_dim < c.d ? c.head_dim : c.d;
    limit = limit < n * (c.heads / c.groups) ? limit : n * (c.heads / c.groups);
    for (size_t j = 0; j < c.groups; j++) {
        /* repeated rows: the first of the head and the even ones are left */
        CHECK(out.ranks[j] == (int32_t)(c.repeated ? (c.head_dim + 1) / 2 : limit));
        for (int32_t t = 0; t < out.ranks[j]; t++)
            for (int32_t s = 0; s < out.ranks[j]; s++) {
                size_t row = j * c.head_dim + (size_t)t;
                int32_t pivot = out.pivots[j * c.head_dim + (size_t)s];
                CHECK(out.right[row * de + (size_t)pivot] == (s == t ? 1.0 : 0.0));
            }
    }

    double *squared = exactly(c.groups * c.head_dim * sizeof(double));
    int32_t *ranks = exactly(c.groups * sizeof(int32_t));
    if (!c.extra) {
        CHECK(!fp_irc_spectrum(&h, squared, threads, work, bytes));
        for (int gauge = 0; gauge < 2; gauge++)
            for (size_t rank = 0; rank <= c.head_dim; rank++) {
                fp_fold_out own = out;
                own.pivots = gauge ? out.pivots : NULL;
                for (size_t j = 0; j < c.groups; j++)
                    ranks[j] = (int32_t)rank;
                CHECK(!fp_irc_apply(&h, ranks, &own, threads, work, bytes));
                for (size_t j = 0; j < c.groups; j++) {
                    double tail = 0;
                    for (size_t i = rank; i < c.head_dim; i++)
                        tail += squared[j * c.head_dim + i];
                    CHECK(fabs(own.error[j] - tail) <= 1e-9 * own.energy[j]);
                }
                if (rank == c.head_dim) /* factors of random numbers are not so well conditioned */
                    CHECK(product_error(&h, &own, l, lb, r, re) < (c.factored ? 1e-6 : 1e-9));
            }
    }

    /* DWC: every remainder rank, and a plain choice of columns */
    double *a = exactly(c.groups * c.head_dim * c.head_dim * sizeof(double));
    double *b = exactly(c.groups * c.head_dim * c.d * sizeof(double));
    double *energy = exactly(c.groups * sizeof(double));
    CHECK(!fp_dwc_spectrum(&h, squared, energy, threads, work, bytes));
    for (size_t k = 0; k <= c.head_dim; k++) {
        for (size_t j = 0; j < c.groups; j++)
            ranks[j] = (int32_t)k;
        CHECK(!fp_dwc_remainder(&h, ranks, &out, a, b, threads, work, bytes));
        for (size_t j = 0; j < c.groups; j++) {
            double tail = 0;
            for (size_t i = k; i < c.head_dim; i++)
                tail += squared[j * c.head_dim + i];
            CHECK(fabs(out.error[j] - tail) <= 1e-9 * (energy[j] + 1));
        }
    }
    fp_fold_out few = out;
    few.capacity = limit;
    CHECK(!fp_dwc_select(&h, NULL, &few, threads, work, bytes));
    for (size_t j = 0; j < c.groups; j++)
        CHECK(few.error[j] >= 0 && few.error[j] <= few.energy[j] * (1 + 1e-12));
    if (c.factored) { /* the chosen columns, given, are fitted alike */
        int32_t *columns = exactly(c.groups * limit * sizeof(int32_t));
        double *chosen = exactly(c.groups * sizeof(double));
        memcpy(chosen, few.error, c.groups * sizeof(double));
        memcpy(columns, few.pivots, c.groups * limit * sizeof(int32_t));
        CHECK(!fp_dwc_select(&h, columns, &few, threads, work, bytes));
        for (size_t j = 0; j < c.groups; j++)
            CHECK(fabs(few.error[j] - chosen[j]) <= 1e-9 * few.energy[j]);
        memset(rf, 0, c.d * sizeof(double)); /* an input that is always zero */
        CHECK(fp_dwc_select(&h, columns, &few, threads, work, bytes) == FP_ERR_RANGE);
        free(columns);
        free(chosen);
    }

    release(work, bytes);
    free(l);
    free(lb);
    free(r);
    free(re);
    free(ls);
    free(rs);
    free(lf);
    free(rf);
    free(out.left);
    free(out.right);
    free(out.pivots);
    free(out.ranks);
    free(out.error);
    free(out.energy);
    free(squared);
    free(ranks);
    free(a);
    free(b);
    free(energy);
}

static void test_rope(int pairing, int gauge)
{
    enum { HEADS = 4, GROUPS = 2, DIM = 6, N = 7, D = 7, PLANES = DIM / 2 };
    double *l = numbers(HEADS * DIM * N), *r = numbers(GROUPS * DIM * D),
           *re = numbers(GROUPS * DIM);
    fp_heads h = {.left = view(l, HEADS * DIM, N),
                  .right = view(r, GROUPS * DIM, D),
                  .right_extra = view(re, GROUPS * DIM, 1),
                  .heads = HEADS,
                  .groups = GROUPS,
                  .head_dim = DIM};
    double scores[GROUPS * PLANES], left[HEADS * PLANES * 2 * N],
        right[GROUPS * PLANES * 2 * (D + 1)];
    double error[GROUPS], energy[GROUPS];
    int32_t planes[GROUPS * PLANES], pivots[GROUPS * PLANES], ranks[GROUPS];
    fp_fold_out out = {left, right, gauge ? pivots : NULL, ranks, error, energy, PLANES};
    CHECK(!fp_rope_scores(&h, (fp_rope)pairing, scores, 2));
    CHECK(!fp_rope_apply(&h, (fp_rope)pairing, scores, NULL, planes, &out, 2));
    double worst = 0;
    for (size_t i = 0; i < HEADS; i++)
        for (size_t p = 0; p < PLANES; p++) {
            size_t first = pairing == FP_ROPE_ADJACENT ? 2 * p : p;
            size_t second = pairing == FP_ROPE_ADJACENT ? 2 * p + 1 : p + PLANES;
            double cosine = cos(0.3 + (double)p), sine = sin(0.3 + (double)p);
            for (size_t a = 0; a < N; a++)
                for (size_t b = 0; b <= D; b++) {
                    size_t g = i / 2;
                    double q0 = l[(i * DIM + first) * N + a], q1 = l[(i * DIM + second) * N + a];
                    double k0 = b < D ? r[(g * DIM + first) * D + b] : re[g * DIM + first];
                    double k1 = b < D ? r[(g * DIM + second) * D + b] : re[g * DIM + second];
                    const double *x = left + (i * PLANES + p) * 2 * N + a;
                    const double *y = right + (g * PLANES + p) * 2 * (D + 1) + b;
                    double want = q0 * (cosine * k0 - sine * k1) + q1 * (sine * k0 + cosine * k1);
                    double have = x[0] * (cosine * y[0] - sine * y[D + 1]) +
                                  x[N] * (sine * y[0] + cosine * y[D + 1]);
                    worst = fmax(worst, fabs(want - have));
                }
        }
    CHECK(worst < 1e-12);
    int32_t fewer[GROUPS] = {1, 2};
    CHECK(!fp_rope_apply(&h, (fp_rope)pairing, scores, fewer, planes, &out, 1));
    CHECK(ranks[0] == 1 && ranks[1] == 2 && planes[1] == -1 && planes[PLANES] < planes[PLANES + 1]);
    fewer[0] = PLANES + 1;
    CHECK(fp_rope_apply(&h, (fp_rope)pairing, scores, fewer, planes, &out, 1) == FP_ERR_RANGE);
    h.right_factor = r; /* planes are scored by scales or by the caller */
    CHECK(fp_rope_scores(&h, (fp_rope)pairing, scores, 1) == FP_ERR_ARGUMENT);
    free(l);
    free(r);
    free(re);
}

/* ---- FPP with update ---- */

/* H = X^T X / rows + damping, row-major. */
static double *second_moment(size_t d)
{
    size_t rows = d + 3;
    double *x = exactly(rows * d * sizeof *x), *h = exactly(d * d * sizeof *h);
    for (size_t i = 0; i < rows * d; i++)
        x[i] = uniform() + (i % d ? x[i - 1] / 2 : 0); /* neighbours are correlated */
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < d; j++) {
            h[i * d + j] = i == j ? 0.05 : 0.0;
            for (size_t r = 0; r < rows; r++)
                h[i * d + j] += x[r * d + i] * x[r * d + j] / (double)rows;
        }
    free(x);
    return h;
}

/* w' of column j, by A, from what the columns before it became. */
static double arrived(const double *w, const float *swept, const float *a, size_t d, size_t j)
{
    double x = w[j];
    for (size_t k = 0; k < j; k++)
        x += (w[k] - (double)swept[k]) * (double)a[k * d + j];
    return x;
}

static void test_sweep(size_t rows, size_t d, fp_obs_options options, int threads)
{
    double *h = second_moment(d), *diagonal = exactly(d * sizeof *diagonal);
    float *a = exactly(d * d * sizeof *a), *swept = exactly(rows * d * sizeof *swept);
    double *w = random_matrix(FP_F64, rows * d, 0);
    fp_matrix view = {w, FP_F64, rows, d, (ptrdiff_t)(d * sizeof *w), sizeof *w};
    uint8_t *mask = exactly(fp_mask_bytes(rows * d));
    for (size_t i = 0; i < fp_mask_bytes(rows * d); i++)
        mask[i] = (uint8_t)(options.rule == FP_OBS_GIVEN ? i * 37 : 0xff);
    if (rows * d % 8)
        mask[rows * d / 8] &= (uint8_t)((1u << rows * d % 8) - 1);

    size_t bytes = fp_obs_factor_work(d);
    void *work = workspace(bytes);
    CHECK(!fp_obs_factor(h, d, a, diagonal, threads, work, bytes));
    CHECK(fp_obs_factor(h, d, a, diagonal, threads, work, bytes - 1) == FP_ERR_ARGUMENT);
    release(work, bytes);
    double worst = 0;
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < d; j++) {
            double sum = 0;
            for (size_t k = i > j ? i : j; k < d; k++)
                sum += (i == k ? 1.0 : (double)a[i * d + k]) * diagonal[k] *
                       (j == k ? 1.0 : (double)a[j * d + k]);
            worst = fmax(worst, fabs(sum - h[i * d + j]));
        }
    CHECK(worst < 1e-5);

    bytes = fp_obs_sweep_work(rows, d, &options, threads);
    work = workspace(bytes);
    CHECK(!fp_obs_sweep(&view, a, diagonal, &options, mask, swept, threads, work, bytes));
    CHECK(fp_obs_sweep(&view, a, diagonal, &options, mask, swept, threads, work, bytes - 1) ==
          FP_ERR_ARGUMENT);
    size_t kept = 0;
    worst = 0;
    for (size_t i = 0; i < rows; i++) {
        size_t in_row = 0, in_group = 0;
        for (size_t j = 0; j < d; j++) {
            size_t at = i * d + j;
            double want = bit(mask, at) ? arrived(w + i * d, swept + i * d, a, d, j) : 0.0;
            worst = fmax(worst, fabs(want - (double)swept[at]));
            in_row += (size_t)bit(mask, at);
            if (options.rule == FP_OBS_NM) {
                in_group = (size_t)bit(mask, at) + (j % options.m ? in_group : 0);
                if ((j + 1) % options.m == 0)
                    CHECK(in_group == options.n);
            }
        }
        kept += in_row;
        CHECK(options.rule != FP_OBS_ROW || in_row == d - options.count);
    }
    CHECK(worst < 1e-5);
    CHECK(options.rule != FP_OBS_BLOCK || kept == rows * d - options.count);
    release(work, bytes);
    free(h);
    free(diagonal);
    free(a);
    free(swept);
    free(w);
    free(mask);
}

/* The gradient of what a row costs is zero in its support. */
static void test_refit(size_t rows, size_t d, int density, int with_rhs, unsigned rounds,
                       size_t group, int threads)
{
    double *h = second_moment(d), *w = random_matrix(FP_F64, rows * d, 0);
    double *rhs = random_matrix(FP_F64, rows * d, 0), *out = exactly(rows * d * sizeof *out);
    fp_matrix view = {w, FP_F64, rows, d, (ptrdiff_t)(d * sizeof *w), sizeof *w};
    uint8_t *mask = exactly(fp_mask_bytes(rows * d));
    memset(mask, 0, fp_mask_bytes(rows * d));
    for (size_t i = 0; i < rows * d; i++) /* pairs of rows share a support */
        if ((i / d / 2 * 7 + i % d * 5) % 11 < (size_t)density)
            mask[i >> 3] |= (uint8_t)(1u << (i & 7));
    size_t bytes = fp_refit_work(mask, with_rhs ? rhs : NULL, rows, d, rounds, threads);
    void *work = workspace(bytes);
    CHECK(!fp_refit(&view, mask, h, with_rhs ? rhs : NULL, rounds, group, out, FP_F64, threads,
                    work, bytes));
    CHECK(fp_refit(&view, mask, h, with_rhs ? rhs : NULL, rounds, group, out, FP_F64, threads, work,
                   bytes - 1) == FP_ERR_ARGUMENT);
    release(work, bytes);
    double worst = 0;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < d; j++) {
            double gradient = with_rhs ? -rhs[i * d + j] : 0.0;
            for (size_t k = 0; k < d; k++)
                gradient += h[j * d + k] * (out[i * d + k] - (with_rhs ? 0.0 : w[i * d + k]));
            worst = fmax(worst, fabs(bit(mask, i * d + j) ? gradient : out[i * d + j]));
        }
    CHECK(worst < 1e-10);

    double *numerator = exactly(rows * sizeof *numerator);
    double *denominator = exactly(rows * sizeof *denominator);
    fp_matrix view_new = view;
    view_new.data = out;
    bytes = fp_damage_work(d, threads);
    work = workspace(bytes);
    CHECK(!fp_damage(&view, &view_new, h, numerator, denominator, threads, work, bytes));
    release(work, bytes);
    worst = 0;
    for (size_t i = 0; i < rows; i++) {
        double changed = 0, whole = 0;
        for (size_t j = 0; j < d; j++)
            for (size_t k = 0; k < d; k++) {
                const double *x = w + i * d, *y = out + i * d;
                changed += (y[j] - x[j]) * h[j * d + k] * (y[k] - x[k]);
                whole += x[j] * h[j * d + k] * x[k];
            }
        worst = fmax(worst, fmax(fabs(changed - numerator[i]), fabs(whole - denominator[i])));
    }
    CHECK(worst < 1e-10 * (double)(d * d));

    int mixed = 0; /* a row that keeps some and removes some has a system to solve */
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 1; j < d; j++)
            mixed |= bit(mask, i * d + j) != bit(mask, i * d);
    for (size_t i = 0; i < d * d; i++)
        h[i] = -h[i];
    bytes = fp_refit_work(mask, NULL, rows, d, 0, threads);
    work = workspace(bytes);
    CHECK(fp_refit(&view, mask, h, NULL, 0, 0, out, FP_F64, threads, work, bytes) ==
          (mixed ? FP_ERR_LAPACK : FP_OK));
    release(work, bytes);
    free(h);
    free(w);
    free(rhs);
    free(out);
    free(mask);
    free(numerator);
    free(denominator);
}

static void test_fit(size_t rows, size_t d)
{
    for (int threads = 1; threads <= 2; threads++) {
        const size_t widths[] = {1, 7, 128};
        for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++) {
            size_t n = rows * d;
            const fp_obs_options options[] = {
                {FP_OBS_BLOCK, n * 7 / 10, 0, 0, 0, widths[i], NULL},
                {FP_OBS_BLOCK, n, 0, 0, 0, widths[i], NULL},
                {FP_OBS_ROW, d / 2, 0, 0, 0, widths[i], NULL},
                {FP_OBS_THRESHOLD, 0, 0.01, 0, 0, widths[i], NULL},
                {FP_OBS_NM, 0, 0, 2, 4, widths[i], NULL},
                {FP_OBS_NM, 0, 0, 3, 5, widths[i], NULL},
                {FP_OBS_GIVEN, 0, 0, 0, 0, widths[i], NULL},
            };
            for (size_t j = 0; j < sizeof options / sizeof options[0]; j++)
                test_sweep(rows, d, options[j], threads);
        }
        for (int density = 0; density <= 11; density += density ? 4 : 3)
            for (int with_rhs = 0; with_rhs < 2; with_rhs++)
                for (unsigned rounds = 0; rounds < 3; rounds++)
                    test_refit(rows, d, density, with_rhs, rounds, rounds == 2 ? 4 : 0, threads);
    }
}

/* ---- sums over rows of activations ---- */

static double signed_value(const fp_matrix *m, size_t i, size_t j)
{
    const char *at =
        (const char *)m->data + (ptrdiff_t)i * m->row_stride + (ptrdiff_t)j * m->col_stride;
    fp_scored one = {at, m->dtype, 1, 1, 1.0, NULL};
    uint16_t half;
    float single;
    double value;
    switch (m->dtype) {
    case FP_F64:
        memcpy(&value, at, sizeof value);
        return value;
    case FP_F32:
        memcpy(&single, at, sizeof single);
        return (double)single;
    default:
        memcpy(&half, at, sizeof half);
        return half >> 15 ? -value_of(&one, 0) : value_of(&one, 0);
    }
}

static int near(double have, double want)
{
    return fabs(have - want) <= 1e-10 * (1 + fabs(want));
}

/* weighted: 0 no weights, 1 zeros and ones, 2 any. */
static void test_moments(fp_dtype dtype, size_t rows, size_t cols, int weighted, int reversed,
                         int threads)
{
    size_t size = fp_dtype_size(dtype);
    char *data = random_matrix(dtype, rows * cols, 0);
    fp_matrix x = {data, dtype, rows, cols, (ptrdiff_t)(cols * size), (ptrdiff_t)size};
    if (reversed) { /* read backwards in both directions */
        x.data = data + (rows * cols - 1) * size;
        x.row_stride = -x.row_stride;
        x.col_stride = -x.col_stride;
    }
    double *weights = weighted ? numbers(rows) : NULL;
    double total = 0, *second = exactly(cols * cols * sizeof *second), *sum = numbers(cols);
    double *squares = numbers(cols);
    size_t counted = 0;
    for (size_t i = 0; i < rows; i++) {
        if (weighted)
            weights[i] = weights[i] < -0.2 ? 0 : weighted == 1 ? 1 : fabs(weights[i]);
        total += weighted ? weights[i] : 1;
        counted += !weighted || weights[i] > 0;
    }
    double *sum_before = exactly(cols * sizeof *sum), *squares_before = exactly(cols * sizeof *sum);
    memcpy(sum_before, sum, cols * sizeof *sum);
    memcpy(squares_before, squares, cols * sizeof *squares);
    for (size_t i = 0; i < cols * cols; i++)
        second[i] = 0.5;
    size_t bytes = fp_moments_work(&x);
    void *work = workspace(bytes);
    fp_row_total first, again;
    CHECK(!fp_moments_update(&x, weights, second, sum, &first, threads, work, bytes));
    CHECK(!fp_square_sums(&x, weights, squares, &again, threads));
    CHECK(near(first.weight, total) && first.rows == counted);
    CHECK(near(again.weight, total) && again.rows == counted);
    int right = 1;
    for (size_t a = 0; a < cols; a++) {
        double want = 0;
        for (size_t t = 0; t < rows; t++)
            want += (weights ? weights[t] : 1) * signed_value(&x, t, a);
        right &= near(sum[a], sum_before[a] + want);
        for (size_t b = 0; b <= a; b++) {
            want = 0;
            for (size_t t = 0; t < rows; t++)
                want +=
                    (weights ? weights[t] : 1) * signed_value(&x, t, a) * signed_value(&x, t, b);
            right &= near(second[a * cols + b], 0.5 + want);
            right &= second[a * cols + b] == second[b * cols + a];
        }
        right &= near(squares[a], squares_before[a] + want); /* want: of b = a */
    }
    CHECK(right);

    /* refused before anything is added */
    double *kept = exactly(cols * cols * sizeof *kept);
    memcpy(kept, second, cols * cols * sizeof *kept);
    size_t bad = 0, last = reversed ? 0 : rows * cols - 1;
    static const unsigned char infinity[4][8] = {
        {0, 0, 0x80, 0x7f}, {0, 0, 0, 0, 0, 0, 0xf0, 0x7f}, {0, 0x7c}, {0x80, 0x7f}};
    if (weighted)
        weights[rows - 1] = 1;
    memcpy(data + last * size, infinity[dtype], size);
    CHECK(fp_rows_check(&x, weights, &bad, threads) == FP_ERR_VALUE && bad == rows - 1);
    CHECK(fp_moments_update(&x, weights, second, sum, &first, threads, work, bytes) ==
          FP_ERR_VALUE);
    CHECK(fp_square_sums(&x, weights, squares, &first, threads) == FP_ERR_VALUE);
    if (weighted) {
        weights[rows - 1] = 0; /* never read */
        CHECK(!fp_rows_check(&x, weights, &bad, threads) && bad == rows);
        weights[0] = -1;
        CHECK(fp_rows_check(&x, weights, &bad, threads) == FP_ERR_VALUE && bad == 0);
    }
    CHECK(!memcmp(kept, second, cols * cols * sizeof *kept));
    CHECK(fp_moments_update(&x, NULL, second, sum, &first, 1, work, bytes - 1) == FP_ERR_ARGUMENT);
    CHECK(fp_moments_update(&x, NULL, NULL, sum, &first, 1, work, bytes) == FP_ERR_ARGUMENT);
    fp_matrix wrong = x;
    wrong.dtype = (fp_dtype)9;
    CHECK(fp_square_sums(&wrong, NULL, squares, &first, 1) == FP_ERR_DTYPE);
    wrong = x;
    wrong.cols = SIZE_MAX / 2;
    CHECK(!fp_moments_work(&wrong));
    release(work, bytes);
    free(data);
    free(weights);
    free(second);
    free(kept);
    free(sum);
    free(squares);
    free(sum_before);
    free(squares_before);
}

static void test_row_counts(void)
{
    const int64_t ids[] = {4, 0, 4, -7, 2};
    const double weights[] = {1, 0.5, 2, 0, 1};
    double counts[5] = {0}, weight;
    CHECK(!fp_count_rows(ids, 5, weights, counts, 5, &weight) && weight == 4.5);
    CHECK(counts[4] == 3 && counts[0] == 0.5 && counts[2] == 1 && counts[1] == 0);
    CHECK(fp_count_rows(ids, 5, NULL, counts, 5, &weight) == FP_ERR_RANGE);
    CHECK(fp_count_rows(ids, 3, NULL, counts, 4, &weight) == FP_ERR_RANGE && counts[4] == 3);
    CHECK(fp_count_rows(ids, 5, weights, NULL, 5, &weight) == FP_ERR_ARGUMENT);
}

int main(void)
{
    fp_blas_set_threads(1);
    const size_t shapes[][2] = {{1, 1}, {1, 9}, {9, 1}, {7, 13}, {16, 24}, {33, 31}};
    for (int dtype = FP_F32; dtype <= FP_BF16; dtype++)
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
            for (int coarse = 0; coarse < 2; coarse++)
                for (int threads = 1; threads <= 2; threads++)
                    test_selection((fp_dtype)dtype, shapes[s][0], shapes[s][1], coarse, threads);

    const fold_case folds[] = {
        {4, 4, 4, 16, 16, 1, 0, 0, 0, 0}, {6, 2, 8, 24, 24, 1, 0, 1, 0, 0},
        {4, 1, 4, 9, 16, 0, 1, 1, 0, 0},  {2, 2, 8, 5, 6, 0, 1, 0, 0, 0},
        {3, 3, 5, 7, 5, 1, 0, 0, 0, 0},   {2, 1, 6, 12, 12, 1, 0, 1, 1, 0},
        {1, 1, 1, 1, 1, 0, 0, 0, 0, 0},   {2, 2, 40, 64, 48, 0, 1, 1, 0, 0},
        {1, 1, 3, 1, 8, 0, 0, 0, 0, 0},   {4, 4, 4, 16, 16, 1, 0, 0, 0, 1},
        {6, 2, 8, 24, 24, 1, 0, 0, 0, 1}, {4, 1, 4, 9, 16, 0, 1, 0, 0, 1},
        {2, 2, 8, 5, 6, 0, 1, 0, 0, 1},   {3, 3, 5, 7, 5, 1, 0, 0, 0, 1},
        {2, 1, 6, 12, 12, 1, 0, 0, 1, 1}, {1, 1, 1, 1, 1, 0, 0, 0, 0, 1},
        {1, 1, 3, 1, 8, 0, 0, 0, 0, 1},
    };
    for (size_t i = 0; i < sizeof folds / sizeof folds[0]; i++)
        for (int threads = 1; threads <= 2; threads++)
            test_fold(folds[i], threads);
    for (int pairing = 0; pairing < 2; pairing++)
        for (int gauge = 0; gauge < 2; gauge++)
            test_rope(pairing, gauge);
    const size_t fits[][2] = {{1, 1}, {1, 9}, {9, 1}, {13, 31}, {100, 20}, {10, 150}};
    for (size_t i = 0; i < sizeof fits / sizeof fits[0]; i++)
        test_fit(fits[i][0], fits[i][1]);
    const size_t moments[][2] = {{1, 1}, {2, 9}, {40, 13}, {5, 200}, {515, 3}, {257, 194}};
    for (int dtype = FP_F32; dtype <= FP_BF16; dtype++)
        for (size_t s = 0; s < sizeof moments / sizeof moments[0]; s++)
            for (int weighted = 0; weighted < 3; weighted++)
                for (int threads = 1; threads <= 2; threads++)
                    test_moments((fp_dtype)dtype, moments[s][0], moments[s][1], weighted,
                                 (int)s % 2, threads);
    test_row_counts();
    return finish();
}
