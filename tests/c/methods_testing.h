/* What tests of whole methods share: checks, random numbers and matrices, blocks of an exact size,
 * and workspaces with a canary behind them for what LAPACK might write. */
#ifndef FOLDPRUNE_METHODS_TESTING_H
#define FOLDPRUNE_METHODS_TESTING_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "foldprune.h"
#include "softmax.h"

static int passed, failed;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (condition) {                                                                           \
            passed++;                                                                              \
        } else {                                                                                   \
            failed++;                                                                              \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
        }                                                                                          \
    } while (0)

static uint64_t state = 88172645463325252u;

static double uniform(void) /* in (-1, 1) */
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (double)(state >> 11) / 4503599627370496.0 - 1.0;
}

static void *exactly(size_t bytes)
{
    void *p = malloc(bytes ? bytes : 1);
    if (!p)
        abort();
    memset(p, 0x5a, bytes);
    return p;
}

static inline double *numbers(size_t n)
{
    double *x = exactly(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = uniform();
    return x;
}

enum { CANARY = 64 };

static inline void *workspace(size_t bytes)
{
    char *p = exactly(bytes + CANARY);
    memset(p + bytes, 0x5a, CANARY);
    return p;
}

static inline void release(void *work, size_t bytes)
{
    const char *p = work;
    int intact = 1;
    for (size_t i = 0; i < CANARY; i++)
        intact &= p[bytes + i] == 0x5a;
    CHECK(intact);
    free(work);
}

/* Dropout's definition: whether the j-th of a row falls away. */
static inline int is_dropped(uint64_t seed, uint64_t row, size_t j, double p)
{
    uint64_t x = seed + (row + 1) * UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    x ^= x >> 31;
    const uint32_t key[2] = {(uint32_t)x, (uint32_t)(x >> 32)};
    return fp_is_dropped(key, (uint32_t)j, (uint32_t)(p * 4294967296.0));
}

static inline int bit(const uint8_t *mask, size_t i)
{
    return mask[i >> 3] >> (i & 7) & 1;
}

static inline void *random_matrix(fp_dtype dtype, size_t n, int coarse)
{
    void *x = exactly(n * fp_dtype_size(dtype));
    for (size_t i = 0; i < n; i++) {
        double value = uniform();
        if (coarse)
            value = floor(value * 4) / 4; /* many ties and zeros */
        float single = (float)value;
        uint32_t bits;
        memcpy(&bits, &single, sizeof bits);
        if (dtype == FP_F64)
            ((double *)x)[i] = value;
        else if (dtype == FP_F32)
            ((float *)x)[i] = single;
        else if (dtype == FP_BF16)
            ((uint16_t *)x)[i] = (uint16_t)(bits >> 16);
        else /* a half with exponent bits of its own: any finite pattern will do */
            ((uint16_t *)x)[i] = (uint16_t)((bits >> 31) << 15 | (bits >> 13 & 0x3ff) |
                                            (coarse ? 0x3800 : (bits & 0xf) << 10));
    }
    return x;
}

static inline double value_of(const fp_scored *t, size_t i)
{
    if (t->dtype == FP_F64)
        return fabs(((const double *)t->x)[i]);
    if (t->dtype == FP_F32)
        return fabs((double)((const float *)t->x)[i]);
    uint16_t half = ((const uint16_t *)t->x)[i];
    if (t->dtype == FP_BF16) {
        uint32_t bits = (uint32_t)half << 16;
        float single;
        memcpy(&single, &bits, sizeof single);
        return fabs((double)single);
    }
    int exponent = half >> 10 & 0x1f, mantissa = half & 0x3ff;
    return exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
}

/* Returns main's answer. */
static int finish(void)
{
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}

#endif
