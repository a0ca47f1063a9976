/* Exponentials of a softmax row, the specification. */
#include "softmax.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

static float exponential(float x)
{
    if (x < FP_EXP_LEAST)
        return 0.0f;
    float rounded = fmaf(x, FP_EXP_LOG2E, FP_EXP_ROUND), n = rounded - FP_EXP_ROUND;
    float r = fmaf(n, -FP_EXP_LN2_LOW, fmaf(n, -FP_EXP_LN2_HIGH, x)), y;
#define START(c) y = (c);
#define STEP(c) y = fmaf(y, r, (c));
    FP_EXP_POLYNOMIAL(START, STEP)
#undef START
#undef STEP
    y = fmaf(y, r * r, r) + 1.0f;
    uint32_t bits;
    float power;
    memcpy(&bits, &rounded, sizeof bits);
    bits = (bits << 23) + (UINT32_C(127) << 23);
    memcpy(&power, &bits, sizeof power);
    return y * power; /* a product, so that NaN stays NaN */
}

static float lane_sum(float lanes[FP_SOFTMAX_LANES])
{
    for (size_t half = FP_SOFTMAX_LANES / 2; half; half /= 2)
        for (size_t i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}

static float largest(float *s, const float *hidden, size_t n)
{
    float most = -INFINITY;
    for (size_t j = 0; j < n; j++) {
        if (hidden && signbit(hidden[j]))
            s[j] = -INFINITY;
        most = most > s[j] ? most : s[j];
    }
    return most + 0.0f; /* of zeros the sign would depend on the order */
}

static float exponentials(float *s, float shift, size_t n)
{
    float lanes[FP_SOFTMAX_LANES] = {0};
    for (size_t j = 0; j < n; j++) {
        s[j] = exponential(s[j] - shift);
        lanes[j % FP_SOFTMAX_LANES] += s[j];
    }
    return lane_sum(lanes);
}

static float exponentials1(float a, const float *b, float reference, const float *hidden, size_t n,
                           float *p)
{
    float lanes[FP_SOFTMAX_LANES] = {0};
    for (size_t j = 0; j < n; j++) {
        float x = a * (b[j] - reference);
        p[j] = exponential(hidden && signbit(hidden[j]) ? -INFINITY : x);
        lanes[j % FP_SOFTMAX_LANES] += p[j];
    }
    return lane_sum(lanes);
}

FP_DEFINE_DROP

const struct fp_softmax_kernels fp_softmax_scalar = {largest, exponentials, exponentials1, drop};
