/* Dropout of activations: its definition, the same bytes from every variant and thread count. */
#include "methods_testing.h"

enum { LARGEST = 5000, ROW = 1024 };

static int is_zero(uint64_t seed, size_t i, double p)
{
    return is_dropped(seed, i / ROW, i % ROW, p);
}

static void test_case(const fp_kernels *kernels, fp_dtype dtype, size_t n, double p, int threads)
{
    size_t bytes = n * fp_dtype_size(dtype);
    void *x = random_matrix(dtype, n, 0), *y = exactly(bytes);
    uint64_t seed = 77 + n;
    int right = 1;
    CHECK(fp_dropout(kernels, x, dtype, n, p, seed, y, threads) == FP_OK);
    for (size_t i = 0; i < n; i++) {
        double factor = is_zero(seed, i, p) ? 0 : 1 / (1 - p);
        right &= dtype == FP_F32 ? ((float *)y)[i] == ((float *)x)[i] * (float)factor
                                 : ((double *)y)[i] == ((double *)x)[i] * factor;
    }
    CHECK(right);
    CHECK(fp_dropout(kernels, x, dtype, n, p, seed, x, 1) == FP_OK); /* in place */
    CHECK(!memcmp(x, y, bytes));
    free(x);
    free(y);
}

static void test_refusals(void)
{
    const fp_kernels *kernels = fp_kernels_default();
    float x[2] = {NAN, 1}, y[2];
    uint64_t seed = 0;
    while (!is_zero(seed, 0, 0.5))
        seed++;
    CHECK(fp_dropout(kernels, x, FP_F32, 2, 0.5, seed, y, 1) == FP_OK && isnan(y[0]));
    CHECK(fp_dropout(kernels, NULL, FP_F32, 0, 0.5, 0, NULL, 1) == FP_OK);
    CHECK(fp_dropout(kernels, NULL, FP_F32, 1, 0.5, 0, y, 1) == FP_ERR_ARGUMENT);
    CHECK(fp_dropout(kernels, x, FP_F32, 1, 0.5, 0, NULL, 1) == FP_ERR_ARGUMENT);
    CHECK(fp_dropout(NULL, x, FP_F32, 1, 0.5, 0, y, 1) == FP_ERR_ARGUMENT);
    CHECK(fp_dropout(kernels, x, FP_F16, 1, 0.5, 0, y, 1) == FP_ERR_DTYPE);
    const double wrong[] = {-0.1, 1, NAN};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        CHECK(fp_dropout(kernels, x, FP_F32, 1, wrong[i], 0, y, 1) == FP_ERR_RANGE);
}

int main(void)
{
    const size_t sizes[] = {0, 1, 15, 17, ROW - 1, ROW, ROW + 1, LARGEST};
    const char *name;
    for (size_t i = 0; (name = fp_isa_name(i)) != NULL; i++)
        if (fp_kernels_find(name))
            for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
                for (int dtype = FP_F32; dtype <= FP_F64; dtype++)
                    for (int tenth = 0; tenth < 10; tenth += 3)
                        test_case(fp_kernels_find(name), (fp_dtype)dtype, sizes[s], tenth / 10.0,
                                  1 + (int)s % 3);
    test_refusals();
    return finish();
}
