/* Products with tiles, the specification. */
#include <string.h>

#include "matmul.h"

#define DEFINE(real, suffix)                                                                       \
    FP_STATIC_##suffix void fp_forward##suffix##_scalar FP_FORWARD_SIGNATURE(real)                 \
    {                                                                                              \
        (void)kept;                                                                                \
        for (size_t i = 0; i < rows; i++)                                                          \
            for (uint64_t m = mask[i]; m; m &= m - 1) {                                            \
                const real *from = x + width * (size_t)__builtin_ctzll(m);                         \
                real w = *values++;                                                                \
                for (size_t t = 0; t < width; t++)                                                 \
                    y[width * i + t] += w * from[t];                                               \
            }                                                                                      \
    }                                                                                              \
                                                                                                   \
    FP_STATIC_##suffix void fp_backward##suffix##_scalar FP_BACKWARD_SIGNATURE(real)               \
    {                                                                                              \
        for (size_t i = 0; i < rows; i++)                                                          \
            for (uint64_t m = mask[i]; m; m &= m - 1) {                                            \
                real *to = dx + width * (size_t)__builtin_ctzll(m);                                \
                real w = *values++;                                                                \
                for (size_t t = 0; t < width; t++)                                                 \
                    to[t] += w * dy[width * i + t];                                                \
            }                                                                                      \
    }                                                                                              \
                                                                                                   \
    FP_STATIC_##suffix void fp_gradient##suffix##_scalar FP_GRADIENT_SIGNATURE(real)               \
    {                                                                                              \
        for (size_t i = 0; i < rows; i++)                                                          \
            for (uint64_t m = mask[i]; m; m &= m - 1) {                                            \
                const real *from = x + width * (size_t)__builtin_ctzll(m);                         \
                real sum = 0;                                                                      \
                for (size_t t = 0; t < width; t++)                                                 \
                    sum += dy[width * i + t] * from[t];                                            \
                *dvalues++ += sum;                                                                 \
            }                                                                                      \
    }                                                                                              \
                                                                                                   \
    void fp_transpose##suffix##_scalar(const real *x, size_t x_stride, size_t rows, size_t cols,   \
                                       real *y, size_t y_stride)                                   \
    {                                                                                              \
        for (size_t j = 0; j < cols; j++)                                                          \
            for (size_t i = 0; i < rows; i++)                                                      \
                y[j * y_stride + i] = x[i * x_stride + j];                                         \
    }

#define FP_STATIC_ static
#define FP_STATIC__f64

DEFINE(float, )
DEFINE(double, _f64)

static float from_f32(float x)
{
    return x;
}

static float from_i8(int8_t x)
{
    return x;
}

static float from_f16(uint16_t x)
{
    float y;
    fp_half_to_float_scalar(&x, 1, &y);
    return y;
}

static float from_bf16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

#define DEFINE_VECTOR(type, suffix)                                                                \
    void fp_vector_##suffix##_scalar FP_VECTOR_SIGNATURE                                           \
    {                                                                                              \
        const type *w = values;                                                                    \
        memset(y, 0, tokens * FP_TILE * sizeof *y);                                                \
        for (size_t tile = 0; tile < tiles; tile++, x += FP_TILE, mask += rows)                    \
            for (size_t i = 0; i < rows; i++)                                                      \
                for (uint64_t m = mask[i]; m; m &= m - 1) {                                        \
                    const float *from = x + __builtin_ctzll(m);                                    \
                    float value = from_##suffix(*w++);                                             \
                    for (size_t t = 0; t < tokens; t++)                                            \
                        y[FP_TILE * t + i] += value * from[t * stride];                            \
                }                                                                                  \
    }

DEFINE_VECTOR(float, f32)
DEFINE_VECTOR(uint16_t, f16)
DEFINE_VECTOR(uint16_t, bf16)
DEFINE_VECTOR(int8_t, i8)

const fp_matmul_kernels fp_matmul_scalar = {
    .width_max = FP_WIDTH_MAX,
    .forward = fp_forward_scalar,
    .backward = fp_backward_scalar,
    .gradient = fp_gradient_scalar,
    .vector_f32 = fp_vector_f32_scalar,
    .vector_f16 = fp_vector_f16_scalar,
    .vector_bf16 = fp_vector_bf16_scalar,
    .vector_i8 = fp_vector_i8_scalar,
    .transpose = fp_transpose_scalar,
};
