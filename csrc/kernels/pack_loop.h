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
    size_t fp_count_bits_##isa(const uint8_t *mask, size_t bytes);                                 \
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

/* `span` elements from i; they may take up to span values from k. Additions are all that the chain
 * through k holds. */
#define FP_PACK_SPAN(span, bits, lanes)                                                            \
    FP_UNROLL                                                                                      \
    for (size_t j = 0; j < (span); j += (lanes)) {                                                 \
        uint32_t m = fp_mask_bits(mask + i / 8, j, lanes);                                         \
        compress##bits(x + i + j, m, values + k);                                                  \
        k += count##lanes(m);                                                                      \
    }

/* The mask as one word: measured faster here, slower in FP_PACK_SPAN. */
#define FP_UNPACK_SPAN(span, bits, lanes)                                                          \
    uint64_t word = 0;                                                                             \
    memcpy(&word, mask + i / 8, (span) / 8);                                                       \
    FP_UNROLL                                                                                      \
    for (size_t j = 0; j < (span); j += (lanes)) {                                                 \
        uint32_t m = (uint32_t)(word >> j) & ((1u << (lanes)) - 1u);                               \
        expand##bits(values + k, m, x + i + j);                                                    \
        k += count##lanes(m);                                                                      \
    }

/* Where the processor counts the bits of a word in one instruction. */
#define FP_DEFINE_COUNT_BITS(isa)                                                                  \
    size_t fp_count_bits_##isa(const uint8_t *mask, size_t bytes)                                  \
    {                                                                                              \
        size_t total = 0, i = 0;                                                                   \
        for (; i + 8 <= bytes; i += 8) {                                                           \
            uint64_t word;                                                                         \
            memcpy(&word, mask + i, 8);                                                            \
            total += (size_t)__builtin_popcountll(word);                                           \
        }                                                                                          \
        return total + fp_count_bits_scalar(mask + i, bytes - i);                                  \
    }

/* The first loop needs one comparison for 64 elements, as there are at least 64 more values. The
 * second goes through the rest by 16, which may be long where little is kept (pruned blocks): it
 * skips empty stretches, and calls the scalar function where fewer than 16 values are left. */
#define FP_DEFINE_PACK_LOOPS(isa, bits, lanes)                                                     \
    void fp_pack##bits##_##isa FP_PACK_SIGNATURE(bits)                                             \
    {                                                                                              \
        size_t i = 0, k = 0;                                                                       \
        for (; i + 64 <= n && k + 64 <= room; i += 64) {                                           \
            FP_PACK_SPAN(64, bits, lanes)                                                          \
        }                                                                                          \
        for (; i + 16 <= n && k < room; i += 16) {                                                 \
            uint32_t next = fp_mask_bits(mask + i / 8, 0, 16);                                     \
            if (!next)                                                                             \
                continue;                                                                          \
            if (k + 16 <= room) {                                                                  \
                FP_PACK_SPAN(16, bits, lanes)                                                      \
            } else {                                                                               \
                fp_pack##bits##_scalar(x + i, mask + i / 8, 16, values + k, room - k);             \
                k = fp_advance(k, next, room);                                                     \
            }                                                                                      \
        }                                                                                          \
        fp_pack##bits##_scalar(x + i, mask + i / 8, n - i, values + k, room - k);                  \
    }                                                                                              \
    void fp_unpack##bits##_##isa FP_UNPACK_SIGNATURE(bits)                                         \
    {                                                                                              \
        size_t i = 0, k = 0;                                                                       \
        for (; i + 64 <= n && k + 64 <= kept; i += 64) {                                           \
            FP_UNPACK_SPAN(64, bits, lanes)                                                        \
        }                                                                                          \
        for (; i + 16 <= n; i += 16) {                                                             \
            uint32_t next = fp_mask_bits(mask + i / 8, 0, 16);                                     \
            if (!next) {                                                                           \
                memset(x + i, 0, 8 * sizeof *x); /* gcc makes 128 bytes at once rep stos: slow */  \
                memset(x + i + 8, 0, 8 * sizeof *x);                                               \
            } else if (k + 16 <= kept) {                                                           \
                FP_UNPACK_SPAN(16, bits, lanes)                                                    \
            } else {                                                                               \
                fp_unpack##bits##_scalar(values + k, kept - k, mask + i / 8, 16, x + i);           \
                k = fp_advance(k, next, kept);                                                     \
            }                                                                                      \
        }                                                                                          \
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

/* Past one value per bit, but not past the last one: a corrupt mask may have too many bits. */
static inline size_t fp_advance(size_t k, uint32_t bits, size_t kept)
{
    for (; bits && k < kept; bits &= bits - 1)
        k++;
    return k;
}

#endif
