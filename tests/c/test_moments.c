/* Sums over rows of activations, against plain definitions. */
#include "lapack.h"
#include "methods_testing.h"

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
