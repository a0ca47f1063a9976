/* The vector kernels of the matmul family, for instruction sets that expand values by a mask fast.
 * Beside what matmul_loop.h needs, a variant's file defines for every type of values
 *
 *     mask_bits(mask, part): the bits of the part-th LANES columns;
 *     expand_<suffix>(values, mask, part): LANES floats, the next values where one of these bits is
 *         set, 0 elsewhere; may read LANES values;
 *
 * and includes this file after matmul_loop.h, and ends with FP_DEFINE_MATMUL(isa). */

/* Every row's sums have lanes of their own until the end: rows of a tile share the vectors of x,
 * which stay in registers where there is one token. Few sums go through two chains each, as the
 * latency of one would be the limit. */
#define DEFINE_BODY(type, suffix)                                                                  \
    INLINE void vector_body_##suffix(const uint64_t *mask, size_t tiles, size_t rows,              \
                                     const type *values, const float *x, size_t stride, float *y,  \
                                     const int tokens, const int chains)                           \
    {                                                                                              \
        vector sums[FP_TILE][FP_VECTOR_TOKENS];                                                    \
        for (size_t i = 0; i < rows; i++)                                                          \
            for (int t = 0; t < tokens; t++)                                                       \
                sums[i][t] = zero();                                                               \
        for (size_t tile = 0; tile < tiles; tile++, x += FP_TILE, mask += rows) {                  \
            vector first[FP_TILE / LANES];                                                         \
            FP_UNROLL                                                                              \
            for (int v = 0; v < FP_TILE / LANES; v++)                                              \
                first[v] = load(x + LANES * v);                                                    \
            for (size_t i = 0; i < rows; i++) {                                                    \
                vector sum[FP_VECTOR_TOKENS][2];                                                   \
                const uint8_t *bytes = (const uint8_t *)(mask + i);                                \
                FP_UNROLL                                                                          \
                for (int v = 0; v < FP_TILE / LANES; v++) {                                        \
                    size_t bits = mask_bits(bytes, v);                                             \
                    vector w = expand_##suffix(values, bytes, v);                                  \
                    values += __builtin_popcountll(bits);                                          \
                    FP_UNROLL                                                                      \
                    for (int t = 0; t < tokens; t++) {                                             \
                        vector from = t ? load(x + stride * (size_t)t + LANES * v) : first[v];     \
                        vector before = v < chains ? zero() : sum[t][v % chains];                  \
                        sum[t][v % chains] = muladd(w, from, v ? before : sums[i][t]);             \
                    }                                                                              \
                }                                                                                  \
                FP_UNROLL                                                                          \
                for (int t = 0; t < tokens; t++)                                                   \
                    sums[i][t] = chains > 1 ? add(sum[t][0], sum[t][1]) : sum[t][0];               \
            }                                                                                      \
        }                                                                                          \
        for (size_t i = 0; i < rows; i++) {                                                        \
            float total[FP_VECTOR_TOKENS];                                                         \
            reduce4(sums[i][0], tokens > 1 ? sums[i][1] : zero(),                                  \
                    tokens > 2 ? sums[i][2] : zero(), tokens > 3 ? sums[i][3] : zero(), total);    \
            for (int t = 0; t < tokens; t++)                                                       \
                y[FP_TILE * t + i] = total[t];                                                     \
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
        .forward = forward,                                                                        \
        .backward = backward,                                                                      \
        .gradient = gradient,                                                                      \
        .vector_f32 = vector_f32,                                                                  \
        .vector_f16 = vector_f16,                                                                  \
        .vector_bf16 = vector_bf16,                                                                \
        .vector_i8 = vector_i8,                                                                    \
        .transpose = fp_transpose_avx2,                                                            \
    }
