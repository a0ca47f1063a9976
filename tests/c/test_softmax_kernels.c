/* Every variant's exponentials against the scalar ones: same bytes, nothing touched outside the
 * ranges, whatever the length and alignment. The scalar ones against exp(). */
#include <math.h>

#include "testing.h"

static float uniform(float low, float high)
{
    return low + (high - low) * ((float)(random_bits() >> 8) / 16777216.0f);
}

/* ---- exact heap blocks: the sanitizer sees a byte too many ---------------------------- */

static float *row_new(float **block, size_t n, size_t offset)
{
    *block = malloc((n + offset ? n + offset : 1) * sizeof **block);
    if (!*block)
        abort();
    for (size_t i = 0; i < offset; i++)
        (*block)[i] = 7;
    return *block + offset;
}

static int head_intact(const float *block, size_t offset)
{
    for (size_t i = 0; i < offset; i++)
        if (block[i] != 7)
            return 0;
    return 1;
}

enum { KINDS = 5 };

static void fill(float *x, size_t n, int kind)
{
    static const float special[] = {-INFINITY, NAN, -87.33654f, -87.33655f, -103.0f, 0.0f, -0.0f};
    for (size_t i = 0; i < n; i++) {
        x[i] = kind == 0 ? uniform(-1, 1) : kind == 1 ? uniform(-90, 80) : uniform(-20, 20);
        if (kind == 3 && uniform(0, 1) < 0.2f)
            x[i] = special[(size_t)uniform(0, 6.99f)];
        if (kind == 4)
            x[i] = -INFINITY;
    }
}

static void fill_hidden(float *hidden, size_t n)
{
    for (size_t i = 0; i < n; i++)
        hidden[i] = uniform(0, 1) < 0.3f ? -1.0f : 1.0f;
}

/* NaN has many bit patterns, of which variants may give any. */
static int same_floats(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, sizeof *a) && !(isnan(a[i]) && isnan(b[i])))
            return 0;
    return 1;
}

/* ---- one case against the specification ------------------------------------------------ */

static void test_case(const struct fp_softmax_kernels *variant, const char *name, size_t n,
                      size_t offset, int kind, int masked)
{
    const struct fp_softmax_kernels *scalar = &fp_softmax_scalar;
    float *blocks[4], *x = row_new(&blocks[0], n, offset), *hidden = row_new(&blocks[1], n, offset);
    float *a = row_new(&blocks[2], n, offset), *b = row_new(&blocks[3], n, offset), one, two;
    size_t bytes = n * sizeof *x;
    fill(x, n, kind);
    fill_hidden(hidden, n);
    const float *mask = masked ? hidden : NULL;

    memcpy(a, x, bytes);
    memcpy(b, x, bytes);
    one = scalar->largest(a, mask, n);
    two = variant->largest(b, mask, n);
    CHECK(same_floats(a, b, n), "%s largest n=%zu kind=%d", name, n, kind);
    CHECK(kind == 3 || same_floats(&one, &two, 1), "%s largest n=%zu kind=%d: %g %g", name, n, kind,
          (double)one, (double)two);

    float shift = kind == 4 ? 0.0f : 1.0f;
    memcpy(a, x, bytes);
    memcpy(b, x, bytes);
    one = scalar->exponentials(a, shift, n);
    two = variant->exponentials(b, shift, n);
    CHECK(same_floats(a, b, n) && same_floats(&one, &two, 1), "%s exponentials n=%zu kind=%d", name,
          n, kind);

    one = scalar->exponentials1(0.83f, x, 1.5f, mask, n, a);
    two = variant->exponentials1(0.83f, x, 1.5f, mask, n, b);
    CHECK(same_floats(a, b, n) && same_floats(&one, &two, 1), "%s exponentials1 n=%zu kind=%d",
          name, n, kind);

    const uint32_t row[2] = {random_bits(), random_bits()};
    const uint32_t limit = n % 7 ? random_bits() : UINT32_MAX * (n % 2), from = random_bits();
    memcpy(a, x, bytes);
    memcpy(b, x, bytes);
    scalar->drop(row, from, limit, n, a);
    variant->drop(row, from, limit, n, b);
    CHECK(same_floats(a, b, n), "%s drop n=%zu kind=%d", name, n, kind);
    for (int i = 0; i < 4; i++) {
        CHECK(head_intact(blocks[i], offset), "%s wrote before its row, n=%zu", name, n);
        free(blocks[i]);
    }
}

static void test_variant(const struct fp_softmax_kernels *variant, const char *name)
{
    for (size_t n = 0; n <= 70; n++)
        for (size_t offset = 0; offset < 4; offset++)
            for (int kind = 0; kind < KINDS; kind++)
                for (int masked = 0; masked < 2; masked++)
                    test_case(variant, name, n, offset, kind, masked);
    for (size_t n = 250; n < 270; n++)
        test_case(variant, name, n, n % 5, 2, n % 2);
}

/* ---- the specification ----------------------------------------------------------------- */

static void test_accuracy(void)
{
    double worst = 0;
    for (int i = 0; i < 2000000; i++) {
        float x = uniform(-87.3f, 88.0f), y = x;
        double expected = exp((double)x);
        fp_softmax_scalar.exponentials(&y, 0.0f, 1);
        double ulp = ldexp(1.0, ilogb(expected) - 23);
        double error = fabs((double)y - expected) / ulp;
        worst = error > worst ? error : worst;
    }
    printf("exponential: at most %.3f ulp\n", worst);
    CHECK(worst <= 2.0, "%g ulp", worst);
}

static void test_special_values(void)
{
    const float x[] = {0.0f, -0.0f, -INFINITY, -87.4f, -1e30f, NAN};
    const float expected[] = {1.0f, 1.0f, 0.0f, 0.0f, 0.0f, NAN};
    for (size_t i = 0; i < sizeof x / sizeof *x; i++) {
        float y = x[i], sum = fp_softmax_scalar.exponentials(&y, 0.0f, 1);
        CHECK(same_floats(&y, &expected[i], 1) && same_floats(&sum, &expected[i], 1),
              "exp(%g) = %g", (double)x[i], (double)y);
    }
    float row[] = {NAN, 3.0f, INFINITY, 1.0f}, p[4];
    const float hidden[] = {-1.0f, 1.0f, -1.0f, 1.0f};
    float sum = fp_softmax_scalar.exponentials1(2.0f, row, 3.0f, hidden, 4, p);
    CHECK(p[0] == 0 && p[1] == 1 && p[2] == 0 && sum == 1.0f + p[3],
          "masked keys may hold anything");
    CHECK(fp_softmax_scalar.largest(row, hidden, 4) == 3, "masked keys may hold anything");
    CHECK(row[0] == -INFINITY && row[2] == -INFINITY, "masked logits are -inf");
    CHECK(fp_softmax_scalar.largest(row, NULL, 0) == -INFINITY, "an empty row");
}

/* Shares and neighbours' shares of what is dropped, in rows and in columns: within six standard
 * deviations. */
static void test_dropping(void)
{
    enum { ROWS = 400, KEYS = 500 };
    static float dropped[ROWS][KEYS];
    const double share = 0.3, n = (double)ROWS * KEYS;
    double all = 0, beside = 0, below = 0;
    for (size_t i = 0; i < ROWS; i++) {
        const uint32_t row[2] = {random_bits(), random_bits()};
        for (size_t j = 0; j < KEYS; j++)
            dropped[i][j] = 1;
        fp_softmax_scalar.drop(row, 0, (uint32_t)(share * 4294967296.0), KEYS, dropped[i]);
        for (size_t j = 0; j < KEYS; j++) {
            all += dropped[i][j] < 0;
            beside += j && dropped[i][j] < 0 && dropped[i][j - 1] < 0;
            below += i && dropped[i][j] < 0 && dropped[i - 1][j] < 0;
        }
    }
    CHECK(fabs(all / n - share) < 6 * sqrt(share * (1 - share) / n), "%g dropped", all / n);
    double both = share * share, width = 6 * sqrt(both / n) + 1.0 / ROWS;
    CHECK(fabs(beside / n - both) < width && fabs(below / n - both) < width,
          "%g beside, %g below each other", beside / n, below / n);
}

int main(void)
{
    test_accuracy();
    test_dropping();
    test_special_values();
#if defined(FP_TEST_EMULATED_AVX512)
    printf("testing avx2 and avx512, emulated\n");
    test_variant(&fp_softmax_avx2, "avx2");
    test_variant(&fp_softmax_avx512, "avx512");
#else
    find_variants();
    for (size_t i = 0; i < variant_count; i++)
        test_variant(variants[i]->softmax, variants[i]->name);
#endif
    return finish();
}
