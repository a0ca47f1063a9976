/* The vector kernels of the matmul family, for instruction sets that expand values by a mask fast.
 * Beside what matmul_loop.h needs, a variant's file defines for every type of values
 *
 *     mask_bits(mask, part): the bits of the part-th LANES columns;
 *     expand_<suffix>(values, mask, part): LANES floats, the next values where one of these bits is
 *         set, 0 elsewhere; may read LANES values;
 *
 * and includes this file after matmul_loop.h, and ends with FP_DEFINE_MATMUL(isa). It may define
 * TILE(suffix, ...) if it has another way than expanded_<suffix>(...) for some tiles. */

/* One tile: adds to every row's sums, and returns where its values end. Rows share the vectors of
 * x, which stay in registers where there is one token. Few sums go through two chains each, as the
 * latency of one would be the limit. */
#define DEFINE_EXPANDED(type, suffix)                                                              \
    INLINE const type *expanded_##suffix(const uint64_t *mask, size_t rows, const type *values,    \
                                         const float *x, size_t stride, vector *sums,              \
                                         const size_t tokens, const int chains)                    \
    {                                                                                              \
        vector first[FP_TILE / LANES];                                                             \
        FP_UNROLL                                                                                  \
        for (int v = 0; v < FP_TILE / LANES; v++)                                                  \
            first[v] = load(x + LANES * v);                                                        \
        for (size_t i = 0; i < rows; i++, sums += tokens) {                                        \
            vector sum[FP_VECTOR_TOKENS][2];                                                       \
            const uint8_t *bytes = (const uint8_t *)(mask + i);                                    \
            FP_UNROLL                                                                              \
            for (int v = 0; v < FP_TILE / LANES; v++) {                                            \
                size_t bits = mask_bits(bytes, v);                                                 \
                if (v % (FP_TILE / LANES / 2) == 0)                                                \
                    fp_ask_ahead(values);                                                          \
                vector w = expand_##suffix(values, bytes, v);                                      \
                values += __builtin_popcountll(bits);                                              \
                FP_UNROLL                                                                          \
                for (size_t t = 0; t < tokens; t++) {                                              \
                    vector from = t ? load(x + stride * t + LANES * v) : first[v];                 \
                    vector before = v < chains ? zero() : sum[t][v % chains];                      \
                    sum[t][v % chains] = muladd(w, from, v ? before : sums[t]);                    \
                }                                                                                  \
            }                                                                                      \
            FP_UNROLL                                                                              \
            for (size_t t = 0; t < tokens; t++)                                                    \
                sums[t] = chains > 1 ? add(sum[t][0], sum[t][1]) : sum[t][0];                      \
        }                                                                                          \
        return values;                                                                             \
    }

DEFINE_EXPANDED(float, f32)
DEFINE_EXPANDED(uint16_t, f16)
DEFINE_EXPANDED(uint16_t, bf16)
DEFINE_EXPANDED(int8_t, i8)

#ifndef TILE
#define TILE(suffix, ...) expanded_##suffix(__VA_ARGS__)
#endif

/* Every row's sums have lanes of their own until the end. */
#define DEFINE_BODY(type, suffix)                                                                  \
    INLINE void vector_body_##suffix(const uint64_t *mask, size_t tiles, size_t rows,              \
                                     const type *values, const float *x, size_t stride, float *y,  \
                                     const size_t tokens, const int chains)                        \
    {                                                                                              \
        vector sums[FP_TILE * FP_VECTOR_TOKENS + 3];                                               \
        for (size_t n = 0; n < rows * tokens + 3; n++)                                             \
            sums[n] = zero();                                                                      \
        for (size_t tile = 0; tile < tiles; tile++, x += FP_TILE, mask += rows)                    \
            values = TILE(suffix, mask, rows, values, x, stride, sums, tokens, chains);            \
        for (size_t n = 0; n < rows * tokens; n += 4) {                                            \
            float total[4];                                                                        \
            reduce4(sums[n], sums[n + 1], sums[n + 2], sums[n + 3], total);                        \
            for (size_t at = n; at < n + 4 && at < rows * tokens; at++)                            \
                y[at % tokens * FP_TILE + at / tokens] = total[at - n];                            \
        }                                                                                          \
    }                                                                                              \
                                                                                                   \
    static void vector_##suffix FP_VECTOR_SIGNATURE                                                \
    {                                                                                              \
        switch (tokens) {                                                                          \
        case 1:                                                                                    \
            vector_body_##suffix(mask, tiles, rows, values, x, stride, y, 1, 2);                   \
            break;                                                                                 \
        case 2:                                                                                    \
            vector_body_##suffix(mask, tiles, rows, values, x, stride, y, 2, 2);                   \
            break;                                                                                 \
        case 3:                                                                                    \
            vector_body_##suffix(mask, tiles, rows, values, x, stride, y, 3, 1);                   \
            break;                                                                                 \
        case 4:                                                                                    \
            vector_body_##suffix(mask, tiles, rows, values, x, stride, y, 4, 1);                   \
            break;                                                                                 \
        }                                                                                          \
    }

DEFINE_BODY(float, f32)
DEFINE_BODY(uint16_t, f16)
DEFINE_BODY(uint16_t, bf16)
DEFINE_BODY(int8_t, i8)

/* The variant's table. */
#define FP_DEFINE_MATMUL(isa)                                                                      \
    const fp_matmul_kernels fp_matmul_##isa = {                                                    \
        .width_max = WIDTH,                                                                        \
        .expands = FORWARD_EXPANDS,                                                                \
        .forward = forward,                                                                        \
        .backward = backward,                                                                      \
        .gradient = gradient,                                                                      \
        .vector_f32 = vector_f32,                                                                  \
        .vector_f16 = vector_f16,                                                                  \
        .vector_bf16 = vector_bf16,                                                                \
        .vector_i8 = vector_i8,                                                                    \
        .transpose = fp_transpose_avx2,                                                            \
    }
