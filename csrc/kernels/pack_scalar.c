/* Pack and unpack, the specification: a byte of the mask at a time, without branches on its bits. */
#include "kernels.h"

/* Stores every element and advances only past kept ones, so there is no branch to mispredict; the
 * last kept element is the last one stored, which keeps the store inside values[0 .. kept). */
#define FP_DEFINE_PACK(bits)                                                                       \
    void fp_pack##bits##_scalar FP_PACK_SIGNATURE(bits)                                            \
    {                                                                                              \
        size_t k = 0;                                                                              \
        for (size_t i = 0; i < n && k < kept; i++) {                                               \
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
