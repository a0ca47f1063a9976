/* Pack and unpack, the specification: a byte of the mask at a time, without branches on its bits.
 */
#include <string.h>

#include "kernels.h"

size_t fp_count_bits_scalar(const uint8_t *mask, size_t bytes)
{
    size_t total = 0, i = 0;
    for (; i + 8 <= bytes; i += 8) {
        uint64_t word;
        memcpy(&word, mask + i, 8);
        /* by halves: a baseline build has no instruction for it, and a table is slower */
        word = word - ((word >> 1) & 0x5555555555555555u);
        word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
        word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
        total += (size_t)((word * 0x0101010101010101u) >> 56);
    }
    for (; i < bytes; i++)
        for (unsigned byte = mask[i]; byte; byte &= byte - 1)
            total++;
    return total;
}

/* Stores every element and advances only past kept ones, so there is no branch to mispredict; once
 * the room is full it stops. */
#define FP_DEFINE_PACK(bits)                                                                       \
    void fp_pack##bits##_scalar FP_PACK_SIGNATURE(bits)                                            \
    {                                                                                              \
        size_t k = 0;                                                                              \
        for (size_t i = 0; i < n && k < room; i++) {                                               \
            values[k] = x[i];                                                                      \
            k += (mask[i >> 3] >> (i & 7)) & 1u;                                                   \
        }                                                                                          \
    }                                                                                              \
    void fp_unpack##bits##_scalar FP_UNPACK_SIGNATURE(bits)                                        \
    {                                                                                              \
        size_t k = 0;                                                                              \
        for (size_t i = 0; i < n; i++) {                                                           \
            uint##bits##_t keep = (uint##bits##_t)((mask[i >> 3] >> (i & 7)) & 1u);                \
            x[i] = k < kept ? (uint##bits##_t)(values[k] & (uint##bits##_t)(0u - keep)) : 0;       \
            k += keep;                                                                             \
        }                                                                                          \
    }

FP_DEFINE_PACK(16)
FP_DEFINE_PACK(32)
FP_DEFINE_PACK(64)
