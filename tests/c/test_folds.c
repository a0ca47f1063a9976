/* The folds of heads, with rotary planes and without, against plain definitions. */
#include "lapack.h"
#include "methods_testing.h"

typedef struct fold_case {
    size_t heads, groups, head_dim, n, d; /* n and d without bias and extra column */
    int bias, extra, scaled, repeated, factored;
} fold_case;

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

int main(void)
{
    fp_blas_set_threads(1);
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
    return finish();
}
