/* Scores and masks, the specification. */
#include <string.h>

#include "kernels.h"

static uint32_t float_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

void fp_half_to_float_scalar(const uint16_t *x, size_t n, float *y)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t sign = (uint32_t)(x[i] & 0x8000u) << 16;
        uint32_t exponent = (x[i] >> 10) & 0x1fu, mantissa = x[i] & 0x3ffu, bits;
        if (exponent == 0x1fu) { /* infinity, or NaN made quiet as the hardware does */
            bits = sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u);
        } else if (exponent) {
            bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
        } else if (mantissa) { /* subnormal: normalise */
            uint32_t shift = 0;
            while (!(mantissa & 0x400u)) {
                mantissa <<= 1;
                shift++;
            }
            bits = sign | ((113u - shift) << 23) | ((mantissa & 0x3ffu) << 13);
        } else {
            bits = sign;
        }
        memcpy(&y[i], &bits, sizeof bits);
    }
}

size_t fp_mask_above_scalar(const float *s, size_t n, float threshold, uint8_t *mask)
{
    uint32_t limit = float_bits(threshold);
    size_t ties = 0;
    for (size_t i = 0; i < n; i += 8) {
        size_t lanes = n - i < 8 ? n - i : 8;
        uint32_t byte = 0;
        for (size_t j = 0; j < lanes; j++) {
            uint32_t bits = float_bits(s[i + j]) & 0x7fffffffu;
            byte |= (uint32_t)(bits > limit) << j;
            ties += bits == limit;
        }
        mask[i >> 3] = (uint8_t)byte;
    }
    return ties;
}

void fp_histogram_low_scalar(const float *s, size_t n, uint32_t high, uint32_t *histogram)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = float_bits(s[i]) & 0x7fffffffu;
        if (bits >> 16 == high)
            histogram[bits & 0xffffu]++;
    }
}
