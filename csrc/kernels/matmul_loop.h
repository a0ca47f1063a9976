/* The loops of the matmul family, the same for all instruction sets. A variant's file sets the
 * target, defines the type `vector` of `LANES` floats, `WIDTH` (the most tokens of a tile) and
 *
 *     load(x), store(x, v), splat(a), zero(), add(a, b);
 *     muladd(a, b, c): a b + c; muladd_if(is, a, b, c): c alone where `is` is 0 and not 1;
 *     lowest_bit(m): the number of the lowest bit of m, not 0;
 *     reduce4(a, b, c, d, y): y[0 .. 4) = the sums of each one's lanes;
 *     reduce4_add(a, b, c, d, y, n): to the first n of y[0 .. 4) they are added, to all if n > 4;
 *
 * and, if it has registers for two chains of sums, defines TWO_CHAINS and
 *
 *     chains_of(vectors): 1 or 2, for rows of so many vectors;
 *     splat_weight(a, vectors): splat(a), where `forward` meets so many vectors with it;
 *
 * and, if it expands values by a mask fast (what matmul_vector.h needs), defines EXPANDS and
 *
 *     expand_from(width): more values a row than that `forward` expands;
 *
 * and then includes this file. */
#include "matmul.h"
#include "target.h"

#ifndef TWO_CHAINS
static inline int chains_of(int vectors)
{
    (void)vectors;
    return 1;
}

static inline vector splat_weight(float a, int vectors)
{
    (void)vectors;
    return splat(a);
}
#endif

enum { MOST = WIDTH / LANES, STEP = FP_WIDTH_STEP / LANES };

/* Calls body(..., vectors) with `vectors` a constant, so that sums stay in registers. */
#define BY_WIDTH(body, ...)                                                                        \
    switch (width / FP_WIDTH_STEP) {                                                               \
        CASE(1, body, __VA_ARGS__)                                                                 \
        CASE(2, body, __VA_ARGS__)                                                                 \
        CASE(3, body, __VA_ARGS__)                                                                 \
        CASE(4, body, __VA_ARGS__)                                                                 \
        CASE(5, body, __VA_ARGS__)                                                                 \
        CASE(6, body, __VA_ARGS__)                                                                 \
        CASE(7, body, __VA_ARGS__)                                                                 \
        CASE(8, body, __VA_ARGS__)                                                                 \
    }
#define CASE(steps, body, ...)                                                                     \
    case steps:                                                                                    \
        if ((steps) * FP_WIDTH_STEP <= WIDTH)                                                      \
            body(__VA_ARGS__, (steps) * STEP);                                                     \
        break;

/* ---- whole rows, and what is expanded to them ---- */

/* They go together, so that a vector of x serves some of them; their sums over up to WHOLE_VECTORS
 * of tokens fill three quarters of the registers, of which AVX2 has 16. */
enum { WHOLE_VECTORS = 6, MOST_TOGETHER = 4 };

static inline int rows_together(int vectors)
{
    return LANES == 8 && vectors > 2 ? 2 : 4;
}

/* Whether the next `together` of so many rows are whole; most often the first one says no. */
INLINE int are_whole(const uint64_t *mask, size_t rows, const int together)
{
    if (mask[0] != UINT64_MAX || rows < (size_t)together)
        return 0;
    uint64_t all = UINT64_MAX;
    FP_UNROLL
    for (int i = 1; i < together; i++)
        all &= mask[i];
    return all == UINT64_MAX;
}

INLINE void whole_part(const float *values, const float *x, float *y, size_t width,
                       const int vectors, const int together)
{
    vector sum[MOST_TOGETHER][WHOLE_VECTORS];
    FP_UNROLL
    for (int n = 0; n < together * vectors; n++)
        sum[n / vectors][n % vectors] = zero();
    for (size_t j = 0; j < FP_TILE; j++, x += width) {
        vector w[MOST_TOGETHER];
        FP_UNROLL
        for (int i = 0; i < together; i++)
            w[i] = splat(values[FP_TILE * i + (int)j]);
        FP_UNROLL
        for (int v = 0; v < vectors; v++) {
            vector from = load(x + LANES * v);
            FP_IN_REGISTER(from);
            FP_UNROLL
            for (int i = 0; i < together; i++)
                sum[i][v] = muladd(w[i], from, sum[i][v]);
        }
    }
    FP_UNROLL
    for (int i = 0; i < together; i++, y += width) {
        FP_UNROLL
        for (int v = 0; v < vectors; v++)
            store(y + LANES * v, add(load(y + LANES * v), sum[i][v]));
    }
}

/* Whole rows of values one after the other. */
INLINE void whole_body(const float *values, const float *x, float *y, const int vectors,
                       const int together)
{
    const int parts = (vectors + WHOLE_VECTORS - 1) / WHOLE_VECTORS;
    const int part = (vectors + parts - 1) / parts;
    FP_UNROLL
    for (int v = 0; v < vectors; v += part)
        whole_part(values, x + LANES * v, y + LANES * v, (size_t)vectors * LANES,
                   vectors - v < part ? vectors - v : part, together);
}

/* ---- kept values one by one ---- */

/* Sums for a row of a tile, or a column. In two chains that take turns where one alone would wait
 * for its last multiply-add before the next, and there are registers for two. */
typedef struct sums {
    vector chain[2][MOST];
} sums;

INLINE void sums_start(sums *s, const int vectors)
{
    FP_UNROLL
    for (int n = 0; n < chains_of(vectors) * vectors; n++)
        s->chain[n / vectors][n % vectors] = zero();
}

INLINE void sums_add(sums *s, const int chain, vector w, const float *from, const int vectors)
{
    FP_ADDRESS(from);
    FP_UNROLL
    for (int v = 0; v < vectors; v++)
        s->chain[chain][v] = muladd(w, load(from + LANES * v), s->chain[chain][v]);
}

/* As sums_add if `is` is 1. It is often 0 and often 1, so that no branch would be foreseen. */
INLINE void sums_add_if(sums *s, int is, vector w, const float *from, const int vectors)
{
    FP_ADDRESS(from);
    FP_UNROLL
    for (int v = 0; v < vectors; v++)
        s->chain[0][v] = muladd_if(is, w, load(from + LANES * v), s->chain[0][v]);
}

INLINE void sums_end(const sums *s, float *y, const int vectors)
{
    FP_UNROLL
    for (int v = 0; v < vectors; v++) {
        vector sum = s->chain[0][v];
        FP_UNROLL
        for (int c = 1; c < chains_of(vectors); c++)
            sum = add(sum, s->chain[c][v]);
        store(y + LANES * v, add(load(y + LANES * v), sum));
    }
}

INLINE void forward_body(const uint64_t *mask, size_t rows, const float *values, const float *x,
                         float *y, const int vectors)
{
    const size_t width = (size_t)vectors * LANES;
    const int chains = chains_of(vectors), together = rows_together(vectors);
    const size_t others = (size_t)together - 1;
    for (size_t i = 0; i < rows; i++, y += width) {
        if (!mask[i])
            continue;
        if (are_whole(mask + i, rows - i, together)) {
            whole_body(values, x, y, vectors, together);
            values += together * FP_TILE;
            i += others;
            y += others * width;
            continue;
        }
        uint64_t m = mask[i];
        int kept = __builtin_popcountll(m);
        sums s;
        sums_start(&s, vectors);
        for (int n = kept / chains; n; n--) {
            FP_UNROLL
            for (int c = 0; c < chains; c++, m &= m - 1)
                sums_add(&s, c, splat_weight(*values++, vectors), x + width * lowest_bit(m),
                         vectors);
        }
        if (chains > 1) {
            int odd = kept % 2; /* else any of the row's may be read */
            const float *from = x + width * lowest_bit(odd ? m : mask[i]);
            sums_add_if(&s, odd, splat_weight(values[odd - 1], vectors), from, vectors);
            values += odd;
        }
        sums_end(&s, y, vectors);
    }
}

#ifdef EXPANDS
enum { FORWARD_EXPANDS = 1 };

/* The next `together` rows of the values up to `end`, which may be read LANES further than they are
 * used: the last ones are so in a copy. Returns where they end. */
INLINE const float *expand_rows(const uint64_t *mask, const float *values, const float *end,
                                float *whole, const int together)
{
    float last[MOST_TOGETHER * FP_TILE + LANES];
    const size_t most = (size_t)together * FP_TILE + LANES, left = (size_t)(end - values);
    const float *from = values;
    if (left < most)
        from = memcpy(last, values, left * sizeof *values);
    const float *at = from;
    for (int i = 0; i < together; i++) {
        const uint8_t *bytes = (const uint8_t *)(mask + i);
        FP_UNROLL
        for (int v = 0; v < FP_TILE / LANES; v++, whole += LANES) {
            store(whole, expand_f32(at, bytes, v));
            at += __builtin_popcountll(mask_bits(bytes, v));
        }
    }
    return values + (at - from);
}

/* As forward_body, where much is kept. */
INLINE void expanded_body(const uint64_t *mask, size_t rows, const float *values, size_t kept,
                          const float *x, float *y, const int vectors)
{
    const int together = rows_together(vectors);
    const float *end = values + kept;
    float whole[MOST_TOGETHER * FP_TILE];
    for (; rows >= (size_t)together; rows -= (size_t)together) {
        values = expand_rows(mask, values, end, whole, together);
        whole_body(whole, x, y, vectors, together);
        mask += together;
        y += together * vectors * LANES;
    }
    forward_body(mask, rows, values, x, y, vectors);
}

static void forward FP_FORWARD_SIGNATURE(float)
{
    if (kept < rows * FP_TILE && kept > rows * expand_from(width)) {
        BY_WIDTH(expanded_body, mask, rows, values, kept, x, y)
    } else {
        BY_WIDTH(forward_body, mask, rows, values, x, y)
    }
}
#else
enum { FORWARD_EXPANDS = 0 };

static void forward FP_FORWARD_SIGNATURE(float)
{
    (void)kept;
    BY_WIDTH(forward_body, mask, rows, values, x, y)
}
#endif

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
    const int chains = chains_of(vectors);
    uint64_t columns[FP_TILE];
    uint32_t next[FP_TILE], before = 0;
    transpose_bits(mask, rows, columns);
    for (size_t i = 0; i < rows; i++) {
        next[i] = before;
        before += (uint32_t)__builtin_popcountll(mask[i]);
    }
    for (size_t j = 0; j < FP_TILE; j++, dx += width) {
        uint64_t m = columns[j];
        if (!m)
            continue;
        int kept = __builtin_popcountll(m);
        sums s;
        sums_start(&s, vectors);
        /* one chain has no odd step, and needs no count */
        for (int n = kept / chains; chains == 1 ? m != 0 : n; n--) {
            FP_UNROLL
            for (int c = 0; c < chains; c++, m &= m - 1) {
                size_t i = lowest_bit(m);
                sums_add(&s, c, splat(values[next[i]++]), dy + width * i, vectors);
            }
        }
        if (chains > 1) {
            int odd = kept % 2; /* else any of the column's may be read */
            size_t i = lowest_bit(odd ? m : columns[j]);
            next[i] += (uint32_t)odd;
            sums_add_if(&s, odd, splat(values[next[i] - 1]), dy + width * i, vectors);
        }
        sums_end(&s, dx, vectors);
    }
}

static void backward FP_BACKWARD_SIGNATURE(float){
    BY_WIDTH(backward_body, mask, rows, values, dy, dx)}

/* Adds the sums over the tokens for the first four columns of *m, which leaves it, or for those
 * that are left. */
INLINE void gradient_of_four(uint64_t *m, int left, const vector *d, const float *x, float *dvalues,
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
    reduce4_add(sum[0], sum[1], sum[2], sum[3], dvalues, left);
}

INLINE void gradient_body(const uint64_t *mask, size_t rows, const float *dy, const float *x,
                          float *dvalues, const int vectors)
{
    const size_t width = (size_t)vectors * LANES;
    for (size_t i = 0; i < rows; i++, dy += width) {
        uint64_t m = mask[i];
        int left = __builtin_popcountll(m);
        vector d[MOST];
        FP_UNROLL
        for (int v = 0; v < vectors; v++)
            d[v] = load(dy + LANES * v);
        for (; left > 0; left -= 4, dvalues += 4)
            gradient_of_four(&m, left, d, x, dvalues, vectors);
        dvalues += left; /* back to where the row's end */
    }
}

static void gradient FP_GRADIENT_SIGNATURE(float)
{
    BY_WIDTH(gradient_body, mask, rows, dy, x, dvalues)
}
