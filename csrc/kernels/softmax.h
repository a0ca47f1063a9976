/* The exponentials of a softmax row, in float32.
 *
 * A row's sum has an order of its own, so that every variant returns the same bytes: 16 lanes, lane
 * l adding the elements l, l + 16, ..., then lanes l and l + 8, l and l + 4, and so on. The scalar
 * file is the specification, fused multiply-adds included.
 *
 * `hidden` is NULL or a number per key whose sign bit says that the key is masked: what its logit
 * is, NaN included, then does not matter. Visible NaNs make the sum NaN. */
#ifndef FOLDPRUNE_SOFTMAX_H
#define FOLDPRUNE_SOFTMAX_H

#include <stddef.h>
#include <stdint.h>

struct fp_softmax_kernels {
    /* Largest of s, hidden ones set to -inf first; -inf if nothing is visible. NaNs may be
     * passed over. */
    float (*largest)(float *s, const float *hidden, size_t n);

    /* s[j] = exp(s[j] - shift), error at most 1 ulp of the result beside what the subtraction
     * rounds off; 0 where that is below the least normal number. Differences are at most 88.
     * Returns the sum. */
    float (*exponentials)(float *s, float shift, size_t n);

    /* p[j] = exp(a * (b[j] - reference)), likewise, 0 where hidden: a row of rank 1, whose logits
     * are never stored. */
    float (*exponentials1)(float a, const float *b, float reference, const float *hidden, size_t n,
                           float *p);

    /* p[j] = -p[j] where fp_is_dropped(row, first + j, limit). */
    void (*drop)(const uint32_t row[2], uint32_t first, uint32_t limit, size_t n, float *p);
};

extern const struct fp_softmax_kernels fp_softmax_scalar;
extern const struct fp_softmax_kernels fp_softmax_avx2;
extern const struct fp_softmax_kernels fp_softmax_avx512;
#define fp_softmax_neon fp_softmax_scalar /* no variant yet */

enum { FP_SOFTMAX_LANES = 16 };

/* Whether a row of weights drops key j, with probability limit / 2^32: a hash of the row's two
 * random numbers and j (multipliers and shifts of C. Wellons' lowbias32), so that the backward pass
 * finds the same again without a matrix of queries by keys. */
static inline int fp_is_dropped(const uint32_t row[2], uint32_t j, uint32_t limit)
{
    uint32_t x = j * UINT32_C(0x9e3779b1) + row[0];
    x = (x ^ x >> 16) * UINT32_C(0x7feb352d) + row[1];
    x = (x ^ x >> 15) * UINT32_C(0x846ca68b);
    return (x ^ x >> 16) < limit;
}

/* The two random numbers of a row: a step of SplitMix64 (Steele et al. 2014) after as many as rows
 * come before. */
static inline void fp_drop_row(uint64_t seed, uint64_t index, uint32_t row[2])
{
    uint64_t x = seed + (index + 1) * UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    x ^= x >> 31;
    row[0] = (uint32_t)x;
    row[1] = (uint32_t)(x >> 32);
}

/* Of a probability in [0, 1). */
static inline uint32_t fp_drop_limit(double probability)
{
    return (uint32_t)(probability * 4294967296.0);
}

/* The loop of `drop`, which compilers make vectors of in each variant's file. */
#define FP_DEFINE_DROP                                                                             \
    static void drop(const uint32_t row[2], uint32_t first, uint32_t limit, size_t n, float *p)    \
    {                                                                                              \
        const uint32_t key[2] = {row[0], row[1]};                                                  \
        for (size_t j = 0; j < n; j++, first++)                                                    \
            p[j] = fp_is_dropped(key, first, limit) ? -p[j] : p[j];                                \
    }

/* exp(x) = 2^n exp(r) with n = round(x log2(e)) and r = x - n ln 2 in two steps. Adding ROUND and
 * subtracting it rounds; its low bits then hold n. The polynomial is Cephes' expf. */
#define FP_EXP_LEAST -87.33654f
#define FP_EXP_LOG2E 1.44269504088896341f
#define FP_EXP_ROUND 12582912.0f
#define FP_EXP_LN2_HIGH 0.693359375f
#define FP_EXP_LN2_LOW -2.12194440e-4f
#define FP_EXP_POLYNOMIAL(start, step)                                                             \
    start(1.9875691500e-4f) step(1.3981999507e-3f) step(8.3334519073e-3f) step(4.1665795894e-2f)   \
        step(1.6666665459e-1f) step(5.0000001201e-1f)

#endif
