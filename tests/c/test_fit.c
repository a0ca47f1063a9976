/* FPP with update: sweep, least squares and damage, against plain definitions. */
#include "lapack.h"
#include "methods_testing.h"

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

int main(void)
{
    fp_blas_set_threads(1);
    const size_t fits[][2] = {{1, 1}, {1, 9}, {9, 1}, {13, 31}, {100, 20}, {10, 150}};
    for (size_t i = 0; i < sizeof fits / sizeof fits[0]; i++)
        test_fit(fits[i][0], fits[i][1]);
    return finish();
}
