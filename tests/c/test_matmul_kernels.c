/* Every variant's products with tiles against sums in double by the definition, over all numbers of
 * rows and widths, densities and alignments; nothing touched outside the ranges. */
#include <math.h>

#include "testing.h"

static float random_float(void)
{
    return (float)random_bits() / 2147483648.0f - 1.0f;
}

/* Floats that begin anywhere a float may and end where the heap block ends. */
static buffer floats(size_t n)
{
    buffer b = buffer_new(n * sizeof(float), sizeof(float), 0);
    for (size_t i = 0; i < n; i++) {
        float x = random_float();
        memcpy(b.data + i * sizeof x, &x, sizeof x);
    }
    return b;
}

static float *of(const buffer *b)
{
    return (float *)(void *)b->data;
}

static const double densities[] = {0, 0.02, 0.1, 0.3, 0.4, 0.5, 0.9, 1};
enum { DENSITIES = sizeof densities / sizeof densities[0] };

typedef struct tile {
    uint64_t mask[FP_TILE];
    size_t rows, kept;
    double dense[FP_TILE][FP_TILE]; /* zero where nothing is kept */
    int index[FP_TILE][FP_TILE];    /* of the value */
    buffer values;
} tile;

/* Whether an element of row i is kept. Some rows, alone and together, are whole: kernels have ways
 * of their own with them. */
static int keeps(double density, size_t i)
{
    int whole = density == 1 || (density > 0 && (i % 16 == 3 || i % 32 / 8 == 1));
    return whole || random_bits() < density * 4294967296.0;
}

static tile tile_new(size_t rows, double density)
{
    tile t = {.rows = rows};
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < FP_TILE; j++)
            if (keeps(density, i)) {
                t.mask[i] |= UINT64_C(1) << j;
                t.index[i][j] = (int)t.kept++;
            }
    t.values = floats(t.kept);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < FP_TILE; j++)
            if (t.mask[i] >> j & 1)
                t.dense[i][j] = (double)of(&t.values)[t.index[i][j]];
    return t;
}

/* Sums of up to 128 products below one, and what was there before. */
static int close_to(float found, double expected)
{
    return fabs((double)found - expected) < 1e-5;
}

static void check_forward(const tile *t, size_t width)
{
    buffer x = floats(FP_TILE * width), before = floats(t->rows * width);
    for (size_t v = 0; v < variant_count; v++) {
        if (width > variants[v]->matmul->width_max)
            continue;
        buffer y = buffer_copy(before.data, before.size, sizeof(float));
        variants[v]->matmul->forward(t->mask, t->rows, of(&t->values), t->kept, of(&x), width,
                                     of(&y));
        int right = intact(&y);
        for (size_t i = 0; i < t->rows; i++)
            for (size_t c = 0; c < width; c++) {
                double sum = (double)of(&before)[i * width + c];
                for (size_t j = 0; j < FP_TILE; j++)
                    sum += t->dense[i][j] * (double)of(&x)[j * width + c];
                right = right && close_to(of(&y)[i * width + c], sum);
            }
        CHECK(right, "%s forward rows=%zu width=%zu", variants[v]->name, t->rows, width);
        free(y.block);
    }
    free(x.block);
    free(before.block);
}

static void check_backward(const tile *t, size_t width)
{
    buffer dy = floats(t->rows * width), before = floats(FP_TILE * width);
    for (size_t v = 0; v < variant_count; v++) {
        if (width > variants[v]->matmul->width_max)
            continue;
        buffer dx = buffer_copy(before.data, before.size, sizeof(float));
        variants[v]->matmul->backward(t->mask, t->rows, of(&t->values), of(&dy), width, of(&dx));
        int right = intact(&dx);
        for (size_t j = 0; j < FP_TILE; j++)
            for (size_t c = 0; c < width; c++) {
                double sum = (double)of(&before)[j * width + c];
                for (size_t i = 0; i < t->rows; i++)
                    sum += t->dense[i][j] * (double)of(&dy)[i * width + c];
                right = right && close_to(of(&dx)[j * width + c], sum);
            }
        CHECK(right, "%s backward rows=%zu width=%zu", variants[v]->name, t->rows, width);
        free(dx.block);
    }
    free(dy.block);
    free(before.block);
}

static void check_gradient(const tile *t, size_t width)
{
    buffer dy = floats(t->rows * width), x = floats(FP_TILE * width), before = floats(t->kept);
    for (size_t v = 0; v < variant_count; v++) {
        if (width > variants[v]->matmul->width_max)
            continue;
        buffer d = buffer_copy(before.data, before.size, sizeof(float));
        variants[v]->matmul->gradient(t->mask, t->rows, of(&dy), of(&x), width, of(&d));
        int right = intact(&d);
        for (size_t i = 0; i < t->rows; i++)
            for (size_t j = 0; j < FP_TILE; j++) {
                if (!(t->mask[i] >> j & 1))
                    continue;
                double sum = (double)of(&before)[t->index[i][j]];
                for (size_t c = 0; c < width; c++)
                    sum += (double)of(&dy)[i * width + c] * (double)of(&x)[j * width + c];
                right = right && close_to(of(&d)[t->index[i][j]], sum);
            }
        CHECK(right, "%s gradient rows=%zu width=%zu", variants[v]->name, t->rows, width);
        free(d.block);
    }
    free(dy.block);
    free(x.block);
    free(before.block);
}

static void test_products(void)
{
    for (size_t rows = 0; rows <= FP_TILE; rows++) {
        for (size_t d = 0; d < DENSITIES; d++) {
            tile t = tile_new(rows, densities[d]);
            for (size_t width = FP_WIDTH_STEP; width <= FP_WIDTH_MAX; width += FP_WIDTH_STEP) {
                if (rows % 8 && (rows + width / FP_WIDTH_STEP) % 8)
                    continue; /* an eighth of the widths for most rows */
                check_forward(&t, width);
                check_backward(&t, width);
                check_gradient(&t, width);
            }
            free(t.values.block);
        }
    }
}

static void test_width(void)
{
    for (size_t v = 0; v < variant_count; v++) {
        size_t best = fp_best_width(variants[v]->matmul), max = variants[v]->matmul->width_max;
        CHECK(best && best <= max && best % FP_WIDTH_STEP == 0, "%s width", variants[v]->name);
    }
}

/* ---- vectors --------------------------------------------------------------------------- */

typedef enum kind { F32, F16, BF16, I8, KINDS } kind;
static const size_t item_sizes[KINDS] = {4, 2, 2, 1};

/* A value of the kind at `to`, which is returned as a number. */
static double random_value(kind k, uint8_t *to)
{
    float single = random_float();
    uint32_t bits;
    uint16_t half;
    int8_t byte = (int8_t)(random_bits() & 0xff);
    memcpy(&bits, &single, sizeof bits);
    switch (k) {
    case F16:
        half = (uint16_t)((bits >> 16 & 0x8000u) | (0x3000u + (bits & 0x7ffu)));
        memcpy(to, &half, sizeof half);
        fp_half_to_float_scalar(&half, 1, &single);
        return (double)single;
    case BF16:
        half = (uint16_t)(bits >> 16);
        bits &= 0xffff0000u;
        memcpy(to, &half, sizeof half);
        memcpy(&single, &bits, sizeof bits);
        return (double)single;
    case I8:
        memcpy(to, &byte, sizeof byte);
        return byte;
    default:
        memcpy(to, &single, sizeof single);
        return (double)single;
    }
}

static void run_vector(const fp_matmul_kernels *m, kind k, const uint64_t *mask, size_t tiles,
                       size_t rows, const void *values, const float *x, size_t stride,
                       size_t tokens, float *y)
{
    if (k == F32)
        m->vector_f32(mask, tiles, rows, values, x, stride, tokens, y);
    else if (k == F16)
        m->vector_f16(mask, tiles, rows, values, x, stride, tokens, y);
    else if (k == BF16)
        m->vector_bf16(mask, tiles, rows, values, x, stride, tokens, y);
    else
        m->vector_i8(mask, tiles, rows, values, x, stride, tokens, y);
}

/* The slack behind the values is all ones, NaN in every float type: it may be read, not used. */
static void check_vector(kind k, size_t tiles, size_t rows, double density, size_t tokens)
{
    size_t stride = tiles * FP_TILE, kept = 0, item = item_sizes[k];
    uint64_t *mask = calloc(tiles * rows + 1, sizeof *mask);
    double *dense = calloc(rows * stride + 1, sizeof *dense);
    buffer values = buffer_new((rows * stride + FP_VALUES_SLACK) * item, item, 0);
    if (!mask || !dense)
        abort();
    for (size_t tile = 0; tile < tiles; tile++)
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < FP_TILE; j++)
                if (keeps(density, i)) {
                    mask[tile * rows + i] |= UINT64_C(1) << j;
                    dense[i * stride + tile * FP_TILE + j] =
                        random_value(k, values.data + item * kept++);
                }
    buffer exact = buffer_copy(values.data, (kept + FP_VALUES_SLACK) * item, item);
    memset(exact.data + kept * item, 0xff, FP_VALUES_SLACK * item);
    buffer x = floats(tokens * stride);
    for (size_t v = 0; v < variant_count; v++) {
        buffer y = floats(FP_VECTOR_TOKENS * FP_TILE);
        run_vector(variants[v]->matmul, k, mask, tiles, rows, exact.data, of(&x), stride, tokens,
                   of(&y));
        int right = intact(&y);
        for (size_t t = 0; t < tokens; t++)
            for (size_t i = 0; i < rows; i++) {
                double sum = 0, size = 0;
                for (size_t j = 0; j < stride; j++) {
                    double term = dense[i * stride + j] * (double)of(&x)[t * stride + j];
                    sum += term;
                    size += fabs(term);
                }
                right = right && fabs((double)of(&y)[t * FP_TILE + i] - sum) <= 1e-5 * size;
            }
        CHECK(right, "%s vector kind=%d tiles=%zu rows=%zu density=%g tokens=%zu",
              variants[v]->name, (int)k, tiles, rows, density, tokens);
        free(y.block);
    }
    free(mask);
    free(dense);
    free(values.block);
    free(exact.block);
    free(x.block);
}

static void test_vector(void)
{
    static const size_t rows[] = {1, 2, 3, 7, 8, 63, 64};
    for (int k = 0; k < KINDS; k++)
        for (size_t tiles = 0; tiles < 4; tiles++)
            for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++)
                for (size_t d = 0; d < DENSITIES; d++)
                    for (size_t tokens = 1; tokens <= FP_VECTOR_TOKENS; tokens++)
                        check_vector((kind)k, tiles, rows[r], densities[d], tokens);
}

/* ---- transposes ------------------------------------------------------------------------ */

static void check_transpose(size_t rows, size_t cols, size_t x_stride, size_t y_stride)
{
    buffer x = floats(rows ? (rows - 1) * x_stride + cols : 0);
    for (size_t v = 0; v < variant_count; v++) {
        size_t n = cols ? (cols - 1) * y_stride + rows : 0;
        buffer y = buffer_new(n * sizeof(float), sizeof(float), 1);
        memset(y.data, 0, y.size);
        variants[v]->matmul->transpose(of(&x), x_stride, rows, cols, of(&y), y_stride);
        int right = intact(&y);
        for (size_t j = 0; j < cols; j++)
            for (size_t i = 0; i < y_stride && j * y_stride + i < n; i++) {
                float expected = i < rows ? of(&x)[i * x_stride + j] : 0.0f;
                right = right && !memcmp(&of(&y)[j * y_stride + i], &expected, sizeof expected);
            }
        CHECK(right, "%s transpose %zu x %zu", variants[v]->name, rows, cols);
        free(y.block);
    }
    free(x.block);
}

static void test_transpose(void)
{
    for (size_t rows = 0; rows < 20; rows++)
        for (size_t cols = 0; cols < 20; cols++) {
            check_transpose(rows, cols, cols + random_bits() % 3, rows + random_bits() % 3);
            check_transpose(rows, cols, cols + 40, rows);
        }
    check_transpose(64, 96, 96, 3072);
}

int main(void)
{
    find_variants();
    test_products();
    test_width();
    test_vector();
    test_transpose();
    return finish();
}
