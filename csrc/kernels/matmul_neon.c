/* Products with tiles, four floats at a time. */
#include "matmul.h"

#if defined(__aarch64__)
#include <arm_neon.h>

enum { LANES = 4, WIDTH = FP_WIDTH_USUAL };
typedef float32x4_t vector;

static inline vector load(const float *x)
{
    return vld1q_f32(x);
}

static inline void store(float *x, vector v)
{
    vst1q_f32(x, v);
}

static inline vector splat(float a)
{
    return vdupq_n_f32(a);
}

static inline vector zero(void)
{
    return vdupq_n_f32(0.0f);
}

static inline vector add(vector a, vector b)
{
    return vaddq_f32(a, b);
}

static inline vector muladd(vector a, vector b, vector c)
{
    return vfmaq_f32(c, a, b);
}

static inline vector muladd_if(int is, vector a, vector b, vector c)
{
    return is ? muladd(a, b, c) : c;
}

static inline size_t lowest_bit(uint64_t m)
{
    return (size_t)__builtin_ctzll(m);
}

static inline void reduce4(vector a, vector b, vector c, vector d, float *y)
{
    vst1q_f32(y, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

static inline void reduce4_add(vector a, vector b, vector c, vector d, float *y, int n)
{
    float sums[4];
    reduce4(a, b, c, d, sums);
    for (int i = 0; i < 4 && i < n; i++)
        y[i] += sums[i];
}

#include "matmul_loop.h"

/* One value at a time there is nothing to expand, which NEON has no instruction for. */
const fp_matmul_kernels fp_matmul_neon = {
    .width_max = WIDTH,
    .forward = forward,
    .backward = backward,
    .gradient = gradient,
    .vector_f32 = fp_vector_f32_scalar,
    .vector_f16 = fp_vector_f16_scalar,
    .vector_bf16 = fp_vector_bf16_scalar,
    .vector_i8 = fp_vector_i8_scalar,
    .transpose = fp_transpose_scalar,
};
#endif
