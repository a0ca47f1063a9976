/* Shuffle tables for pack and unpack, as constant expressions: no generator, nothing to initialise.
 *
 * An entry is a vector of byte indices, one word per 8 of them; a lane of W bytes (1, 2, 4, 8) is
 * addressed by W consecutive indices. Entry m of a table serves the mask bits m. */
#ifndef FOLDPRUNE_PACK_TABLES_H
#define FOLDPRUNE_PACK_TABLES_H

#include <stdint.h>

#define FP_TABLE_ONES(W) (~UINT64_C(0) >> (64 - 8 * (W)))
#define FP_TABLE_LANE(W, lane)                                                                     \
    ((UINT64_C(0x0706050403020100) + UINT64_C(0x0101010101010101) * ((W) * (lane))) &              \
     FP_TABLE_ONES(W))
#define FP_TABLE_RANK(m, bit) __builtin_popcount((unsigned)(m) & ((1u << (bit)) - 1u))

/* Puts a lane's indices at the slot, if that is in the given word of the entry. */
#define FP_TABLE_PUT(W, word, slot, indices)                                                       \
    ((slot) * (W) / 8 == (word) ? (indices) << (slot) * (W) % 8 * 8 : 0)
#define FP_TABLE_SUM8(F, m, W, word)                                                               \
    (F(m, W, word, 0) | F(m, W, word, 1) | F(m, W, word, 2) | F(m, W, word, 3) |                   \
     F(m, W, word, 4) | F(m, W, word, 5) | F(m, W, word, 6) | F(m, W, word, 7))

/* Pack: slot r holds the r-th kept lane; the slots past the last are free (here 0). */
#define FP_TABLE_PACK_BIT(m, W, word, bit)                                                         \
    ((m) >> (bit) & 1 ? FP_TABLE_PUT(W, word, FP_TABLE_RANK(m, bit), FP_TABLE_LANE(W, bit)) : 0)
#define FP_PACK_WORD(m, W, word) FP_TABLE_SUM8(FP_TABLE_PACK_BIT, m, W, word)

/* Unpack: a kept lane takes the next value; a removed one has the top bit of its indices set, which
 * byte shuffles read as "zero". */
#define FP_TABLE_UNPACK_BIT(m, W, word, bit)                                                       \
    FP_TABLE_PUT(W, word, bit,                                                                     \
                 (m) >> (bit) & 1 ? FP_TABLE_LANE(W, FP_TABLE_RANK(m, bit))                        \
                                  : UINT64_C(0x8080808080808080) & FP_TABLE_ONES(W))
#define FP_UNPACK_WORD(m, W, word) FP_TABLE_SUM8(FP_TABLE_UNPACK_BIT, m, W, word)

/* Entries of one word, or of two. */
#define FP_PACK_1(m, W) FP_PACK_WORD(m, W, 0)
#define FP_UNPACK_1(m, W) FP_UNPACK_WORD(m, W, 0)
#define FP_PACK_2(m, W) {FP_PACK_WORD(m, W, 0), FP_PACK_WORD(m, W, 1)}
#define FP_UNPACK_2(m, W) {FP_UNPACK_WORD(m, W, 0), FP_UNPACK_WORD(m, W, 1)}

/* Initialisers: the entries E(0, W), E(1, W) and so on. */
#define FP_TABLE_4(E, W, m) E((m), W), E((m) + 1, W), E((m) + 2, W), E((m) + 3, W)
#define FP_TABLE_16(E, W, m)                                                                       \
    FP_TABLE_4(E, W, m), FP_TABLE_4(E, W, (m) + 4), FP_TABLE_4(E, W, (m) + 8),                     \
        FP_TABLE_4(E, W, (m) + 12)
#define FP_TABLE_64(E, W, m)                                                                       \
    FP_TABLE_16(E, W, m), FP_TABLE_16(E, W, (m) + 16), FP_TABLE_16(E, W, (m) + 32),                \
        FP_TABLE_16(E, W, (m) + 48)
#define FP_TABLE_256(E, W)                                                                         \
    FP_TABLE_64(E, W, 0), FP_TABLE_64(E, W, 64), FP_TABLE_64(E, W, 128), FP_TABLE_64(E, W, 192)

#endif
