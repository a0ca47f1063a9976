/* The loops of the matmul family, the same for all instruction sets. A variant's file sets the
 * target, defines the type `vector` of `LANES` floats and
 *
 *     load(x), store(x, v), splat(a), zero(), add(a, b);
 *     muladd(a, b, c): a b + c;
 *     lowest_bit(m): the number of the lowest bit of m, not 0;
 *     reduce4(a, b, c, d, y): y[0 .. 4) = the sums of each one's lanes;
 *
 * and then includes this file. */
#include "matmul.h"
#include "target.h"

enum { MOST = FP_WIDTH_MAX / LANES, STEP = FP_WIDTH_STEP / LANES };

/* Calls body(..., vectors) with `vectors` a constant, so that sums stay in registers. */
#define BY_WIDTH(body, ...)                                                                        \
    switch (width / FP_WIDTH_STEP) {                                                               \
    case 1:                                                                                        \
        body(__VA_ARGS__, STEP);                                                                   \
        break;                                                                                     \
    case 2:                                                                                        \
        body(__VA_ARGS__, 2 * STEP);                                                               \
        break;                                                                                     \
    case 3:                                                                                        \
        body(__VA_ARGS__, 3 * STEP);                                                               \
        break;                                                                                     \
    case 4:                                                                                        \
        body(__VA_ARGS__, 4 * STEP);                                                               \
        break;                                                                                     \
    case 5:                                                                                        \
        body(__VA_ARGS__, 5 * STEP);                                                               \
        break;                                                                                     \
    case 6:                                                                                        \
        body(__VA_ARGS__, 6 * STEP);                                                               \
        break;                                                                                     \
    }

/* Rows that are whole go together, so that a vector of x serves WHOLE_ROWS of them; their sums over
 * up to WHOLE_VECTORS of tokens fill three quarters of the registers, of which AVX2 has 16. */
enum { WHOLE_ROWS = LANES == 8 ? 2 : 4, WHOLE_VECTORS = 6 };

/* Whether the next WHOLE_ROWS of so many rows are; most often the first one says no. */
static inline int are_whole(const uint64_t *mask, size_t rows)
{
    if (mask[0] != UINT64_MAX || rows < WHOLE_ROWS)
        return 0;
    uint64_t all = UINT64_MAX;
    FP_UNROLL
    for (int i = 1; i < WHOLE_ROWS; i++)
        all &= mask[i];
    return all == UINT64_MAX;
}

INLINE void whole_body(const float *values, const float *x, float *y, size_t width,
                       const int vectors)
{
    vector sum[WHOLE_ROWS][WHOLE_VECTORS];
    FP_UNROLL
    for (int n = 0; n < WHOLE_ROWS * vectors; n++)
        sum[n / vectors][n % vectors] = zero();
    for (size_t j = 0; j < FP_TILE; j++, x += width) {
        vector w[WHOLE_ROWS];
        FP_UNROLL
        for (int i = 0; i < WHOLE_ROWS; i++)
            w[i] = splat(values[FP_TILE * i + (int)j]);
        FP_UNROLL
        for (int v = 0; v < vectors; v++) {
            vector from = load(x + LANES * v);
            FP_IN_REGISTER(from);
            FP_UNROLL
            for (int i = 0; i < WHOLE_ROWS; i++)
                sum[i][v] = muladd(w[i], from, sum[i][v]);
        }
    }
    FP_UNROLL
    for (int i = 0; i < WHOLE_ROWS; i++, y += width) {
        FP_UNROLL
        for (int v = 0; v < vectors; v++)
            store(y + LANES * v, add(load(y + LANES * v), sum[i][v]));
    }
}

INLINE void forward_body(const uint64_t *mask, size_t rows, const float *values, const float *x,
                         float *y, const int vectors)
{
    const size_t width = (size_t)vectors * LANES;
    for (size_t i = 0; i < rows; i++, y += width) {
        if (!mask[i])
            continue;
        if (are_whole(mask + i, rows - i)) {
            FP_UNROLL
            for (int v = 0; v < vectors; v += WHOLE_VECTORS)
                whole_body(values, x + LANES * v, y + LANES * v, width,
                           vectors - v < WHOLE_VECTORS ? vectors - v : WHOLE_VECTORS);
            values += WHOLE_ROWS * FP_TILE;
            i += WHOLE_ROWS - 1;
            y += (WHOLE_ROWS - 1) * width;
            continue;
        }
        vector sum[MOST];
        FP_UNROLL
        for (int v = 0; v < vectors; v++)
            sum[v] = zero();
        for (uint64_t m = mask[i]; m; m &= m - 1) {
            const float *from = x + width * lowest_bit(m);
            FP_ADDRESS(from);
            vector w = splat(*values++);
            FP_UNROLL
            for (int v = 0; v < vectors; v++)
                sum[v] = muladd(w, load(from + LANES * v), sum[v]);
        }
        FP_UNROLL
        for (int v = 0; v < vectors; v++)
            store(y + LANES * v, add(load(y + LANES * v), sum[v]));
    }
}

static void forward FP_FORWARD_SIGNATURE(float)
{
    BY_WIDTH(forward_body, mask, rows, values, x, y)
}

/* bit i of columns[j] = bit j of mask[i]: squares of 32, 16, ... 1 bits are swapped
 * across the diagonal. */
static void transpose_bits(const uint64_t *mask, size_t rows, uint64_t columns[FP_TILE])
{
    for (size_t i = 0; i < FP_TILE; i++)
        columns[i] = i < rows ? mask[i] : 0;
    uint64_t low = 0xffffffffu;
    for (size_t size = 32; size; size /= 2, low ^= low << size)
        for (size_t begin = 0; begin < FP_TILE; begin += 2 * size)
            for (size_t i = begin; i < begin + size; i++) { /* side by side: for vectors */
                uint64_t swap = (columns[i] >> size ^ columns[i + size]) & low;
                columns[i] ^= swap << size;
                columns[i + size] ^= swap;
            }
}

/* By columns: a row's values are met in order, so one counter a row finds them. */
INLINE void backward_body(const uint64_t *mask, size_t rows, const float *values, const float *dy,
                          float *dx, const int vectors)
{
    const size_t width = (size_t)vectors * LANES;
    uint64_t columns[FP_TILE];
    uint32_t next[FP_TILE], before = 0;
    transpose_bits(mask, rows, columns);
    for (size_t i = 0; i < rows; i++) {
        next[i] = before;
        before += (uint32_t)__builtin_popcountll(mask[i]);
    }
    for (size_t j = 0; j < FP_TILE; j++, dx += width) {
        vector sum[MOST];
        FP_UNROLL
        for (int v = 0; v < vectors; v++)
            sum[v] = zero();
        for (uint64_t m = columns[j]; m; m &= m - 1) {
            size_t i = lowest_bit(m);
            const float *from = dy + width * i;
            FP_ADDRESS(from);
            vector w = splat(values[next[i]++]);
            FP_UNROLL
            for (int v = 0; v < vectors; v++)
                sum[v] = muladd(w, load(from + LANES * v), sum[v]);
        }
        FP_UNROLL
        for (int v = 0; v < vectors; v++)
            store(dx + LANES * v, add(load(dx + LANES * v), sum[v]));
    }
}

static void backward FP_BACKWARD_SIGNATURE(float){
    BY_WIDTH(backward_body, mask, rows, values, dy, dx)}

/* Sums over the tokens for the first four columns of *m, which leaves it; the first again where
 * fewer are left. */
INLINE void gradient_of_four(uint64_t *m, const vector *d, const float *x, float sums[4],
                             const int vectors)
{
    const size_t width = (size_t)vectors * LANES;
    const float *first = x + width * lowest_bit(*m), *from[4];
    FP_UNROLL
    for (int c = 0; c < 4; c++) {
        from[c] = *m ? x + width * lowest_bit(*m) : first;
        FP_ADDRESS(from[c]);
        *m &= *m - 1; /* 0 stays 0 */
    }
    vector sum[4] = {zero(), zero(), zero(), zero()};
    FP_UNROLL
    for (int v = 0; v < vectors; v++) {
        FP_UNROLL
        for (int c = 0; c < 4; c++)
            sum[c] = muladd(d[v], load(from[c] + LANES * v), sum[c]);
    }
    reduce4(sum[0], sum[1], sum[2], sum[3], sums);
}

INLINE void gradient_body(const uint64_t *mask, size_t rows, const float *dy, const float *x,
                          float *dvalues, const int vectors)
{
    const size_t width = (size_t)vectors * LANES;
    for (size_t i = 0; i < rows; i++, dy += width) {
        uint64_t m = mask[i];
        int left = __builtin_popcountll(m);
        vector d[MOST];
        float sums[4];
        FP_UNROLL
        for (int v = 0; v < vectors; v++)
            d[v] = load(dy + LANES * v);
        for (; left >= 4; left -= 4, dvalues += 4) {
            gradient_of_four(&m, d, x, sums, vectors);
            for (int c = 0; c < 4; c++)
                dvalues[c] += sums[c];
        }
        if (left)
            gradient_of_four(&m, d, x, sums, vectors);
        for (int c = 0; c < left; c++)
            *dvalues++ += sums[c];
    }
}

static void gradient FP_GRADIENT_SIGNATURE(float)
{
    BY_WIDTH(gradient_body, mask, rows, dy, x, dvalues)
}
