/* Whole products and lookups under the sanitizers: every buffer ends where its heap block ends, and
 * results are those of the definition. */
#include <math.h>

#include "testing.h"

static float random_float(void)
{
    return (float)random_bits() / 2147483648.0f - 1.0f;
}

static void *exact(size_t items, size_t size)
{
    void *block = calloc(items ? items : 1, size);
    if (!block)
        abort();
    return block;
}

static float *random_floats(size_t n)
{
    float *x = exact(n, sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = random_float();
    return x;
}

/* A packed matrix and what it stands for. */
typedef struct fixture {
    fp_packed p;
    uint64_t *mask, *offset;
    void *values;
    float *scale, *dense; /* dense: (rows x cols) */
    size_t kept;
} fixture;

static const size_t item_sizes[] = {4, 8, 2, 2, 1}; /* by fp_dtype */

static fixture fixture_new(const fp_kernels *k, size_t rows, size_t cols, double density,
                           fp_dtype dtype)
{
    fixture f = {.p = {.rows = rows, .cols = cols, .dtype = FP_F32}};
    uint8_t *bits = exact(fp_mask_bytes(rows * cols), 1);
    float *w = random_floats(rows * cols);
    for (size_t i = 0; i < rows * cols; i++) {
        int keep = density == 1 || random_bits() < density * 4294967296.0;
        bits[i / 8] |= (uint8_t)(keep << i % 8);
    }
    f.mask = exact(fp_packed_words(rows, cols), sizeof *f.mask);
    f.offset = exact(fp_packed_tiles(rows, cols) + 1, sizeof *f.offset);
    CHECK(!fp_packed_mask(bits, rows, cols, f.mask, 2), "%zu x %zu", rows, cols);
    CHECK(!fp_packed_offsets(f.mask, rows, cols, f.offset, 2), "%zu x %zu", rows, cols);
    f.kept = (size_t)f.offset[fp_packed_tiles(rows, cols)];
    f.p.mask = f.mask;
    f.p.offset = f.offset;
    f.values = exact(f.kept, item_sizes[dtype]);
    f.dense = exact(rows * cols, sizeof *f.dense);
    if (dtype == FP_I8) {
        float *floats = exact(f.kept, sizeof *floats);
        f.scale = exact(rows, sizeof *f.scale);
        CHECK(!fp_packed_fill(k, &f.p, w, 4, floats, 2), "fill");
        f.p.values = floats;
        CHECK(!fp_packed_quantise(&f.p, f.values, f.scale, 2), "quantise");
        free(floats);
        f.p.scale = f.scale;
    } else if (dtype == FP_F32) {
        CHECK(!fp_packed_fill(k, &f.p, w, 4, f.values, 2), "fill");
    } else { /* the upper halves of floats: bfloat16, or halves of other numbers */
        uint16_t *halves = exact(rows * cols, sizeof *halves);
        for (size_t i = 0; i < rows * cols; i++)
            halves[i] = (uint16_t)((random_bits() & 0x83ffu) |
                                   (dtype == FP_F16 ? 0x3800u : 0x3f00u)); /* below one */
        CHECK(!fp_packed_fill(k, &f.p, halves, 2, f.values, 2), "fill");
        free(halves);
    }
    f.p.dtype = dtype;
    f.p.values = f.values;
    if (dtype == FP_F32 || dtype == FP_I8) {
        CHECK(!fp_packed_unpack(k, &f.p, f.dense, 2), "unpack");
    } else {
        uint16_t *halves = exact(rows * cols, sizeof *halves);
        CHECK(!fp_packed_unpack(k, &f.p, halves, 2), "unpack");
        for (size_t i = 0; i < rows * cols; i++) {
            uint32_t single = (uint32_t)halves[i] << 16;
            if (dtype == FP_F16)
                fp_half_to_float_scalar(&halves[i], 1, &f.dense[i]);
            else
                memcpy(&f.dense[i], &single, sizeof single);
        }
        free(halves);
    }
    for (size_t i = 0; i < rows * cols; i++) {
        int keep = bits[i / 8] >> i % 8 & 1;
        if (!keep || dtype == FP_F32)
            CHECK(f.dense[i] == (keep ? w[i] : 0.0f), "element %zu", i);
    }
    free(bits);
    free(w);
    return f;
}

static void fixture_free(fixture *f)
{
    free(f->mask);
    free(f->offset);
    free(f->values);
    free(f->scale);
    free(f->dense);
}

static int close_to(const float *found, const double *expected, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)found[i] - expected[i]) < 1e-4))
            return 0;
    return 1;
}

static void check_products(const fp_kernels *k, const fixture *f, size_t tokens, int threads)
{
    size_t rows = f->p.rows, cols = f->p.cols, bytes = fp_matmul_work(&f->p, tokens, threads);
    float *x = random_floats(tokens * cols), *dy = random_floats(tokens * rows);
    float *bias = random_floats(rows), *y = exact(tokens * rows, 4), *dx = exact(tokens * cols, 4);
    float *dvalues = exact(f->kept, 4);
    double *expected = exact(tokens * (rows + cols) + rows * cols, sizeof *expected);
    double *expected_dx = expected + tokens * rows, *expected_dw = expected_dx + tokens * cols;
    void *work = exact(bytes, 1);
    for (size_t t = 0; t < tokens; t++)
        for (size_t i = 0; i < rows; i++) {
            double *sum = &expected[t * rows + i];
            *sum = (double)bias[i];
            for (size_t j = 0; j < cols; j++) {
                double w = (double)f->dense[i * cols + j];
                *sum += w * (double)x[t * cols + j];
                expected_dx[t * cols + j] += w * (double)dy[t * rows + i];
                expected_dw[i * cols + j] += (double)dy[t * rows + i] * (double)x[t * cols + j];
            }
        }
    for (int method = FP_MATMUL_AUTO; method <= FP_MATMUL_DENSE; method++) {
        memset(y, 0xff, tokens * rows * sizeof *y);
        fp_status status = fp_matmul_forward(k, &f->p, x, tokens, bias, y, (fp_matmul_method)method,
                                             threads, work, bytes);
        CHECK(!status && close_to(y, expected, tokens * rows),
              "%s forward %zu x %zu, %zu tokens, dtype %d, method %d", fp_kernels_name(k), rows,
              cols, tokens, (int)f->p.dtype, method);
    }
    double *kept = exact(f->kept, sizeof *kept);
    CHECK(!fp_packed_fill(k, &f->p, expected_dw, sizeof *kept, kept, 1), "fill");
    const fp_matmul_method both[] = {FP_MATMUL_AUTO, FP_MATMUL_SPARSE, FP_MATMUL_DENSE};
    for (size_t i = 0; i < sizeof both / sizeof both[0]; i++) {
        memset(dx, 0xff, tokens * cols * sizeof *dx);
        fp_status status =
            fp_matmul_backward(k, &f->p, dy, tokens, dx, both[i], threads, work, bytes);
        CHECK(!status && close_to(dx, expected_dx, tokens * cols),
              "%s backward %zu x %zu, %zu tokens, dtype %d, method %d", fp_kernels_name(k), rows,
              cols, tokens, (int)f->p.dtype, (int)both[i]);
        memset(dvalues, 0xff, f->kept * sizeof *dvalues);
        status =
            fp_matmul_gradient(k, &f->p, dy, x, tokens, dvalues, both[i], threads, work, bytes);
        if (f->p.dtype == FP_I8)
            CHECK(status == FP_ERR_DTYPE, "status %d", (int)status);
        else
            CHECK(!status && close_to(dvalues, kept, f->kept),
                  "%s gradient %zu x %zu, %zu tokens, dtype %d, method %d", fp_kernels_name(k),
                  rows, cols, tokens, (int)f->p.dtype, (int)both[i]);
    }
    free(kept);
    CHECK(fp_matmul_backward(k, &f->p, dy, tokens, dx, FP_MATMUL_VECTOR, threads, work, bytes) ==
              FP_ERR_ARGUMENT,
          "there is none for few tokens");
    CHECK(bytes < 64 || fp_matmul_backward(k, &f->p, dy, tokens, dx, FP_MATMUL_AUTO, threads, work,
                                           bytes - 64),
          "too little work is refused");
    free(x);
    free(dy);
    free(bias);
    free(y);
    free(dx);
    free(dvalues);
    free(expected);
    free(work);
}

static void check_lookups(const fp_kernels *k, const fixture *f)
{
    enum { N = 9 };
    int64_t ids[N];
    size_t cols = f->p.cols;
    if (!f->p.rows || (f->p.dtype != FP_F32 && f->p.dtype != FP_I8))
        return;
    for (size_t i = 0; i < N; i++)
        ids[i] = (int64_t)(i ? random_bits() % f->p.rows : f->p.rows - 1);
    float *rows = exact(N * cols, 4);
    CHECK(!fp_packed_lookup(k, &f->p, ids, N, rows, 2), "lookup");
    for (size_t i = 0; i < N; i++)
        CHECK(!cols || !memcmp(rows + i * cols, f->dense + (size_t)ids[i] * cols, 4 * cols),
              "row %zu", i);
    float *dvalues = exact(f->kept, 4);
    double *sums = exact(f->p.rows * cols, sizeof *sums), *kept = exact(f->kept, sizeof *kept);
    for (size_t i = 0; i < N; i++)
        for (size_t j = 0; j < cols && ids[i] != ids[1]; j++)
            sums[(size_t)ids[i] * cols + j] += (double)rows[i * cols + j];
    CHECK(!fp_packed_fill(k, &f->p, sums, sizeof *sums, kept, 1), "fill");
    CHECK(!fp_packed_lookup_gradient(k, &f->p, ids, N, ids[1], rows, dvalues, 2) &&
              close_to(dvalues, kept, f->kept),
          "gradient of lookups");
    ids[4] = (int64_t)f->p.rows;
    CHECK(fp_packed_lookup(k, &f->p, ids, N, rows, 2) == FP_ERR_RANGE, "id past the last row");
    free(rows);
    free(dvalues);
    free(sums);
    free(kept);
}

int main(void)
{
    static const size_t shapes[][2] = {{1, 1}, {64, 64}, {65, 63}, {70, 200}, {5, 129}, {0, 4}};
    static const size_t tokens[] = {0, 1, 3, 5, 30, 97, 249, 170};
    static const double densities[] = {0, 0.001, 0.3, 0.9, 1};
    find_variants();
    for (size_t v = 0; v < variant_count; v++)
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
            for (size_t d = 0; d < sizeof densities / sizeof densities[0]; d++)
                for (int dtype = FP_F32; dtype <= FP_I8; dtype++) {
                    if (dtype == FP_F64)
                        continue; /* the specification's own arithmetic: Python compares it */
                    fixture f = fixture_new(variants[v], shapes[s][0], shapes[s][1], densities[d],
                                            (fp_dtype)dtype);
                    for (size_t t = 0; t < sizeof tokens / sizeof tokens[0]; t++)
                        check_products(variants[v], &f, tokens[t], 1 + (int)(t % 3));
                    check_lookups(variants[v], &f);
                    fixture_free(&f);
                }
    uint64_t stray = UINT64_C(1) << 63, offset[2];
    CHECK(fp_packed_offsets(&stray, 1, 63, offset, 1) == FP_ERR_CORRUPT, "a bit past the columns");
    return finish();
}
