/* The loops of the score family, the same for all instruction sets. A variant's file defines
 *
 *     widen(x, y): y[0 .. halves) = x[0 .. halves), IEEE half to float;
 *     compare(s, limit, &above): above's bit i = |s[i]| > limit, for i < block, as integers, and
 *         returns how many are equal; limit < 2^31;
 *     matches(s, high): bit i = |s[i]| has `high` (< 2^15) in bits 30..16, for i < block;
 *
 * and then FP_DEFINE_SCORE_LOOPS(isa, halves, block). */
#ifndef FOLDPRUNE_SCORE_LOOP_H
#define FOLDPRUNE_SCORE_LOOP_H

#include <string.h>

#include "matmul.h"
#include "target.h"

#define FP_DEFINE_SCORE_LOOPS(isa, halves, block)                                                  \
    static void half_to_float(const uint16_t *x, size_t n, float *y)                               \
    {                                                                                              \
        size_t i = 0;                                                                              \
        for (; i + (halves) <= n; i += (halves))                                                   \
            widen(x + i, y + i);                                                                   \
        fp_half_to_float_scalar(x + i, n - i, y + i);                                              \
    }                                                                                              \
                                                                                                   \
    static size_t mask_above(const float *s, size_t n, float threshold, uint8_t *mask)             \
    {                                                                                              \
        uint32_t limit;                                                                            \
        memcpy(&limit, &threshold, sizeof limit);                                                  \
        size_t ties = 0, i = 0;                                                                    \
        /* -0.0f reaches the scalar function, so that signed comparisons are allowed */            \
        for (; i + (block) <= n && limit <= 0x7fffffffu; i += (block)) {                           \
            uint64_t above;                                                                        \
            ties += compare(s + i, limit, &above);                                                 \
            memcpy(mask + i / 8, &above, (block) / 8);                                             \
        }                                                                                          \
        return ties + fp_mask_above_scalar(s + i, n - i, threshold, mask + i / 8);                 \
    }                                                                                              \
                                                                                                   \
    static void histogram_low(const float *s, size_t n, uint32_t high, uint32_t *histogram)        \
    {                                                                                              \
        size_t i = 0;                                                                              \
        for (; i + (block) <= n && high <= 0x7fffu; i += (block)) {                                \
            for (uint64_t m = matches(s + i, high); m; m &= m - 1) {                               \
                uint32_t bits;                                                                     \
                memcpy(&bits, s + i + __builtin_ctzll(m), sizeof bits);                            \
                histogram[bits & 0xffffu]++;                                                       \
            }                                                                                      \
        }                                                                                          \
        fp_histogram_low_scalar(s + i, n - i, high, histogram);                                    \
    }

/* The table `name`: matmul by the same name, all else by isa. */
#define FP_DEFINE_KERNELS(name_, isa)                                                              \
    const fp_kernels fp_kernels_##name_ = {                                                        \
        .name = #name_,                                                                            \
        .count_bits = fp_count_bits_##isa,                                                         \
        .pack16 = fp_pack16_##isa,                                                                 \
        .pack32 = fp_pack32_##isa,                                                                 \
        .pack64 = fp_pack64_##isa,                                                                 \
        .unpack16 = fp_unpack16_##isa,                                                             \
        .unpack32 = fp_unpack32_##isa,                                                             \
        .unpack64 = fp_unpack64_##isa,                                                             \
        .half_to_float = half_to_float,                                                            \
        .mask_above = mask_above,                                                                  \
        .histogram_low = histogram_low,                                                            \
        .softmax = &fp_softmax_##isa,                                                              \
        .matmul = &fp_matmul_##name_,                                                              \
    }

#endif
