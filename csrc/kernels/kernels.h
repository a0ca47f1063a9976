/* The table of kernels that have one variant per instruction set.
 *
 * The scalar file of a family is its specification: every variant returns the same bytes. A variant
 * never reads or writes outside the ranges given here, so chunks can go to threads.
 */
#ifndef FOLDPRUNE_KERNELS_H
#define FOLDPRUNE_KERNELS_H

#include "foldprune.h"
#include "softmax.h"

/* values[0 .. ) = elements of x[0 .. n) whose mask bit is set. There is room for so many values, at
 * least for these; what follows them may be anything then. Where there is more, none has to be
 * stored one by one. */
#define FP_PACK_SIGNATURE(bits)                                                                    \
    (const uint##bits##_t *x, const uint8_t *mask, size_t n, uint##bits##_t *values, size_t room)
/* x[0 .. n) from values[0 .. kept), zero where the mask bit is clear. */
#define FP_UNPACK_SIGNATURE(bits)                                                                  \
    (const uint##bits##_t *values, size_t kept, const uint8_t *mask, size_t n, uint##bits##_t *x)

struct fp_kernels {
    const char *name;

    /* pack family (pack_*.c); mask starts at bit 0 of its first byte */
    size_t (*count_bits)(const uint8_t *mask, size_t bytes); /* set bits of whole bytes */
    void(*pack16) FP_PACK_SIGNATURE(16);
    void(*pack32) FP_PACK_SIGNATURE(32);
    void(*pack64) FP_PACK_SIGNATURE(64);
    void(*unpack16) FP_UNPACK_SIGNATURE(16);
    void(*unpack32) FP_UNPACK_SIGNATURE(32);
    void(*unpack64) FP_UNPACK_SIGNATURE(64);

    /* score family (score_*.c) */

    /* y[i] = (float)x[i]: IEEE half, exact, subnormals and NaN included. */
    void (*half_to_float)(const uint16_t *x, size_t n, float *y);

    /* mask bit i = |s[i]| > threshold, unused bits of the last byte zero; returns how many |s[i]|
     * equal the threshold. threshold >= 0, no NaN. Compared as integers, so subnormals count
     * whatever the processor's flush-to-zero mode. */
    size_t (*mask_above)(const float *s, size_t n, float threshold, uint8_t *mask);

    /* Of the elements whose |s[i]| has `high` in bits 30..16, histogram[bits 15..0] += 1. */
    void (*histogram_low)(const float *s, size_t n, uint32_t high, uint32_t *histogram);

    const struct fp_softmax_kernels *softmax; /* softmax family (softmax_*.c) */
    const struct fp_matmul_kernels *matmul;   /* matmul.h */
};

extern const fp_kernels fp_kernels_scalar;
extern const fp_kernels fp_kernels_avx2;
extern const fp_kernels fp_kernels_avx512;
extern const fp_kernels fp_kernels_avx512icl;
extern const fp_kernels fp_kernels_neon;

/* Scalar pieces that variants use for their tails. */
size_t fp_count_bits_scalar(const uint8_t *mask, size_t bytes);
void fp_pack16_scalar FP_PACK_SIGNATURE(16);
void fp_pack32_scalar FP_PACK_SIGNATURE(32);
void fp_pack64_scalar FP_PACK_SIGNATURE(64);
void fp_unpack16_scalar FP_UNPACK_SIGNATURE(16);
void fp_unpack32_scalar FP_UNPACK_SIGNATURE(32);
void fp_unpack64_scalar FP_UNPACK_SIGNATURE(64);
void fp_half_to_float_scalar(const uint16_t *x, size_t n, float *y);
size_t fp_mask_above_scalar(const float *s, size_t n, float threshold, uint8_t *mask);
void fp_histogram_low_scalar(const float *s, size_t n, uint32_t high, uint32_t *histogram);

#endif
