/* Pack and unpack with table lookups (tbl), which read 0 for an index past the vector. */
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "pack_loop.h"
#include "pack_tables.h"

static const uint64_t pack16_table[256][2] = {FP_TABLE_256(FP_PACK_2, 2)};
static const uint64_t unpack16_table[256][2] = {FP_TABLE_256(FP_UNPACK_2, 2)};
static const uint64_t pack32_table[16][2] = {FP_TABLE_16(FP_PACK_2, 4, 0)};
static const uint64_t unpack32_table[16][2] = {FP_TABLE_16(FP_UNPACK_2, 4, 0)};
static const uint64_t pack64_table[4][2] = {FP_TABLE_4(FP_PACK_2, 8, 0)};
static const uint64_t unpack64_table[4][2] = {FP_TABLE_4(FP_UNPACK_2, 8, 0)};

/* Counts without a trip to the vector unit, which has the only popcount, where they are short. */
static inline size_t count8(uint32_t m)
{
    return (size_t)__builtin_popcount(m);
}

static inline size_t count4(uint32_t m)
{
    return (size_t)(UINT64_C(0x4332322132212110) >> 4 * m & 15u);
}

static inline size_t count2(uint32_t m)
{
    return m - (m >> 1);
}

static inline void shuffle(const void *from, const uint64_t entry[2], void *to)
{
    uint8x16_t index = vreinterpretq_u8_u64(vld1q_u64(entry));
    vst1q_u8(to, vqtbl1q_u8(vld1q_u8(from), index));
}

#define DEFINE_SHUFFLES(bits)                                                                      \
    static inline void compress##bits(const uint##bits##_t *x, uint32_t m, uint##bits##_t *values) \
    {                                                                                              \
        shuffle(x, pack##bits##_table[m], values);                                                 \
    }                                                                                              \
    static inline void expand##bits(const uint##bits##_t *values, uint32_t m, uint##bits##_t *x)   \
    {                                                                                              \
        shuffle(values, unpack##bits##_table[m], x);                                               \
    }

DEFINE_SHUFFLES(16)
DEFINE_SHUFFLES(32)
DEFINE_SHUFFLES(64)

FP_DEFINE_COUNT_BITS(neon)
FP_DEFINE_PACK_LOOPS(neon, 16, 8)
FP_DEFINE_PACK_LOOPS(neon, 32, 4)
FP_DEFINE_PACK_LOOPS(neon, 64, 2)
#endif
