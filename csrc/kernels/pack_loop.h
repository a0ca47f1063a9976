/* The loops of pack and unpack, the same for all instruction sets. A variant's file defines, for
 * every item size of `bits` bits,
 *
 *     compress<bits>(x, m, values): stores the elements of x[0 .. lanes) whose bit is set in m, in
 *         order, and after them anything up to values[lanes);
 *     expand<bits>(values, m, x): the inverse, zero where the bit is clear; may read values[lanes);
 *     count<lanes>(m): the number of set bits;
 *
 * and then FP_DEFINE_PACK_LOOPS(isa, bits, lanes). */
#ifndef FOLDPRUNE_PACK_LOOP_H
#define FOLDPRUNE_PACK_LOOP_H

#include <string.h>

#include "kernels.h"
#include "target.h"

#define FP_DECLARE_PACK(isa)                                                                       \
    void fp_pack16_##isa FP_PACK_SIGNATURE(16);                                                    \
    void fp_pack32_##isa FP_PACK_SIGNATURE(32);                                                    \
    void fp_pack64_##isa FP_PACK_SIGNATURE(64);                                                    \
    void fp_unpack16_##isa FP_UNPACK_SIGNATURE(16);                                                \
    void fp_unpack32_##isa FP_UNPACK_SIGNATURE(32);                                                \
    void fp_unpack64_##isa FP_UNPACK_SIGNATURE(64)

/* Shared between pack_<isa>.c and score_<isa>.c, which has the table of kernels. */
FP_DECLARE_PACK(avx2);
FP_DECLARE_PACK(avx512);
FP_DECLARE_PACK(neon);

/* `span` mask bits at a time as long as `span` more values fit, whatever the mask says: one comparison
 * for all of them, and additions alone in the chain through k. */
#define FP_PACK_SPANS(span, bits, lanes)                                                           \
    for (; i + (span) <= n && k + (span) <= kept; i += (span)) {                                   \
        FP_UNROLL                                                                                  \
        for (size_t j = 0; j < (span); j += (lanes)) {                                             \
            uint32_t m = fp_mask_bits(mask + i / 8, j, lanes);                                        \
            compress##bits(x + i + j, m, values + k);                                              \
            k += count##lanes(m);                                                                  \
        }                                                                                          \
    }

/* The mask comes in as one word here: the load ports are busy with loads that cross cache lines. */
#define FP_UNPACK_SPANS(span, bits, lanes)                                                         \
    for (; i + (span) <= n && k + (span) <= kept; i += (span)) {                                   \
        uint64_t word = 0;                                                                         \
        memcpy(&word, mask + i / 8, (span) / 8);                                                   \
        FP_UNROLL                                                                                  \
        for (size_t j = 0; j < (span); j += (lanes)) {                                             \
            uint32_t m = (uint32_t)(word >> j) & ((1u << (lanes)) - 1u);                           \
            expand##bits(values + k, m, x + i + j);                                                \
            k += count##lanes(m);                                                                  \
        }                                                                                          \
    }

/* The scalar function ends what the spans leave: fewer than 16 values, or fewer than 16 elements. */
#define FP_DEFINE_PACK_LOOPS(isa, bits, lanes)                                                     \
    void fp_pack##bits##_##isa FP_PACK_SIGNATURE(bits)                                             \
    {                                                                                              \
        size_t i = 0, k = 0;                                                                       \
        FP_PACK_SPANS(64, bits, lanes)                                                             \
        FP_PACK_SPANS(16, bits, lanes)                                                             \
        fp_pack##bits##_scalar(x + i, mask + i / 8, n - i, values + k, kept - k);                  \
    }                                                                                              \
    void fp_unpack##bits##_##isa FP_UNPACK_SIGNATURE(bits)                                         \
    {                                                                                              \
        size_t i = 0, k = 0;                                                                       \
        FP_UNPACK_SPANS(64, bits, lanes)                                                           \
        FP_UNPACK_SPANS(16, bits, lanes)                                                           \
        fp_unpack##bits##_scalar(values + k, kept - k, mask + i / 8, n - i, x + i);                \
    }

/* Mask bits i .. i + lanes; lanes divides 8, or is 16. */
static inline uint32_t fp_mask_bits(const uint8_t *mask, size_t i, unsigned lanes)
{
    if (lanes == 16) {
        uint16_t pair;
        memcpy(&pair, mask + i / 8, sizeof pair);
        return pair;
    }
    return (uint32_t)(mask[i / 8] >> i % 8) & ((1u << lanes) - 1u);
}

#endif
