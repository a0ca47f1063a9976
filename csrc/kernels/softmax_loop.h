/* The loops of the softmax family, the same for all instruction sets. A variant's file defines
 * `row`, 16 floats in registers, and
 *
 *     load(p), store(p, v), broadcast(x), add(v, w), subtract(v, w), multiply(v, w);
 *     fma_row(u, v, w): u * v + w, rounded once;
 *     most(v, w): the larger; w where either is NaN;
 *     replace(v, mask, w): w where the sign bit of mask is set, v elsewhere;
 *     power(v): 2^(the integer in the low bits of v);
 *     keep(v, x, least): v, but 0 where x < least;
 *     halves_sum(v), halves_most(v): over the 16 lanes, l with l + 8 first;
 *
 * and then FP_DEFINE_SOFTMAX_LOOPS(isa). A last part of a row goes through a padded copy. */
#ifndef FOLDPRUNE_SOFTMAX_LOOP_H
#define FOLDPRUNE_SOFTMAX_LOOP_H

#include <math.h>
#include <string.h>

#include "softmax.h"
#include "target.h"

#define FP_EXP_START(c) y = broadcast(c);
#define FP_EXP_STEP(c) y = fma_row(y, r, broadcast(c));

#define FP_DEFINE_SOFTMAX_LOOPS(isa)                                                               \
    static inline row exponential(row x)                                                           \
    {                                                                                              \
        row rounded = fma_row(x, broadcast(FP_EXP_LOG2E), broadcast(FP_EXP_ROUND)), y;             \
        row n = subtract(rounded, broadcast(FP_EXP_ROUND));                                        \
        row r = fma_row(n, broadcast(-FP_EXP_LN2_HIGH), x);                                        \
        r = fma_row(n, broadcast(-FP_EXP_LN2_LOW), r);                                             \
        FP_EXP_POLYNOMIAL(FP_EXP_START, FP_EXP_STEP)                                               \
        y = add(fma_row(y, multiply(r, r), r), broadcast(1.0f));                                   \
        return keep(multiply(y, power(rounded)), x, broadcast(FP_EXP_LEAST));                      \
    }                                                                                              \
                                                                                                   \
    /* A copy of the last n < 16 elements, the rest filled up. */                                  \
    static inline row load_last(const float *p, size_t n, float fill)                              \
    {                                                                                              \
        float copy[FP_SOFTMAX_LANES];                                                              \
        for (size_t i = 0; i < FP_SOFTMAX_LANES; i++)                                              \
            copy[i] = i < n ? p[i] : fill;                                                         \
        return load(copy);                                                                         \
    }                                                                                              \
                                                                                                   \
    static inline void store_last(float *p, row v, size_t n)                                       \
    {                                                                                              \
        float copy[FP_SOFTMAX_LANES];                                                              \
        store(copy, v);                                                                            \
        memcpy(p, copy, n * sizeof *p);                                                            \
    }                                                                                              \
                                                                                                   \
    static float largest(float *s, const float *hidden, size_t n)                                  \
    {                                                                                              \
        row least = broadcast(-INFINITY), found = least;                                           \
        size_t j = 0;                                                                              \
        for (; j + FP_SOFTMAX_LANES <= n; j += FP_SOFTMAX_LANES) {                                 \
            row v = load(s + j);                                                                   \
            if (hidden) {                                                                          \
                v = replace(v, load(hidden + j), least);                                           \
                store(s + j, v);                                                                   \
            }                                                                                      \
            found = most(v, found);                                                                \
        }                                                                                          \
        if (j < n) {                                                                               \
            row v = load_last(s + j, n - j, -INFINITY);                                            \
            if (hidden) {                                                                          \
                v = replace(v, load_last(hidden + j, n - j, -1.0f), least);                        \
                store_last(s + j, v, n - j);                                                       \
            }                                                                                      \
            found = most(v, found);                                                                \
        }                                                                                          \
        return halves_most(found) + 0.0f;                                                          \
    }                                                                                              \
                                                                                                   \
    static float exponentials(float *s, float shift, size_t n)                                     \
    {                                                                                              \
        row sum = broadcast(0.0f), by = broadcast(shift);                                          \
        size_t j = 0;                                                                              \
        for (; j + FP_SOFTMAX_LANES <= n; j += FP_SOFTMAX_LANES) {                                 \
            row e = exponential(subtract(load(s + j), by));                                        \
            store(s + j, e);                                                                       \
            sum = add(sum, e);                                                                     \
        }                                                                                          \
        if (j < n) {                                                                               \
            row e = exponential(subtract(load_last(s + j, n - j, -INFINITY), by));                 \
            store_last(s + j, e, n - j);                                                           \
            sum = add(sum, e);                                                                     \
        }                                                                                          \
        return halves_sum(sum);                                                                    \
    }                                                                                              \
                                                                                                   \
    static float exponentials1(float a, const float *b, float reference, const float *hidden,      \
                               size_t n, float *p)                                                 \
    {                                                                                              \
        row sum = broadcast(0.0f), slope = broadcast(a), from = broadcast(reference);              \
        row least = broadcast(-INFINITY);                                                          \
        size_t j = 0;                                                                              \
        for (; j + FP_SOFTMAX_LANES <= n; j += FP_SOFTMAX_LANES) {                                 \
            row x = multiply(slope, subtract(load(b + j), from));                                  \
            if (hidden)                                                                            \
                x = replace(x, load(hidden + j), least);                                           \
            row e = exponential(x);                                                                \
            store(p + j, e);                                                                       \
            sum = add(sum, e);                                                                     \
        }                                                                                          \
        if (j < n) {                                                                               \
            row x = multiply(slope, subtract(load_last(b + j, n - j, 0.0f), from));                \
            if (hidden)                                                                            \
                x = replace(x, load_last(hidden + j, n - j, 0.0f), least);                         \
            row e = exponential(x);                                                                \
            store_last(p + j, e, n - j);                                                           \
            sum = add(sum, load_last(p + j, n - j, 0.0f));                                         \
        }                                                                                          \
        return halves_sum(sum);                                                                    \
    }                                                                                              \
                                                                                                   \
    FP_DEFINE_DROP                                                                                 \
                                                                                                   \
    const struct fp_softmax_kernels fp_softmax_##isa = {largest, exponentials, exponentials1, drop};

#endif
