/* Pack and unpack with table shuffles. Tables, not pext/pdep: those are microcode on Zen 1 and 2.
 */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "pack_loop.h"
#include "pack_tables.h"

FP_TARGET_BEGIN(FP_AVX2_FEATURES)

/* 16-bit lanes: indices for pshufb. 32-bit lanes: lane numbers for vpermd, one byte each, widened
 * at use to keep the table at 2 KB. 64-bit lanes: pairs of such numbers. */
static const uint64_t pack16_table[256][2] = {FP_TABLE_256(FP_PACK_2, 2)};
static const uint64_t unpack16_table[256][2] = {FP_TABLE_256(FP_UNPACK_2, 2)};
static const uint64_t pack32_table[256] = {FP_TABLE_256(FP_PACK_1, 1)};
static const uint64_t unpack32_table[256] = {FP_TABLE_256(FP_UNPACK_1, 1)};
static const uint64_t pack64_table[16] = {FP_TABLE_16(FP_PACK_1, 2, 0)};
static const uint64_t unpack64_table[16] = {FP_TABLE_16(FP_UNPACK_1, 2, 0)};

static inline size_t count8(uint32_t m)
{
    return (size_t)_mm_popcnt_u32(m);
}

static inline size_t count4(uint32_t m)
{
    return (size_t)_mm_popcnt_u32(m);
}

static inline __m128i load128(const void *p)
{
    return _mm_loadu_si128((const __m128i *)p);
}

static inline __m256i load256(const void *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

static inline void compress16(const uint16_t *x, uint32_t m, uint16_t *values)
{
    __m128i packed = _mm_shuffle_epi8(load128(x), load128(pack16_table[m]));
    _mm_storeu_si128((__m128i *)values, packed);
}

static inline void expand16(const uint16_t *values, uint32_t m, uint16_t *x)
{
    __m128i spread = _mm_shuffle_epi8(load128(values), load128(unpack16_table[m]));
    _mm_storeu_si128((__m128i *)x, spread);
}

/* 8 lanes of 32 bits, of which vpermd reads the low 3 bits. */
static inline __m256i indices(const uint64_t *entry)
{
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)entry));
}

static inline void permute_pack(const void *x, const uint64_t *entry, void *values)
{
    __m256i packed = _mm256_permutevar8x32_epi32(load256(x), indices(entry));
    _mm256_storeu_si256((__m256i *)values, packed);
}

/* vpermd cannot write zeros: the sign of the index does. */
static inline void permute_unpack(const void *values, const uint64_t *entry, void *x)
{
    __m256i index = indices(entry);
    __m256i spread = _mm256_permutevar8x32_epi32(load256(values), index);
    spread = _mm256_andnot_si256(_mm256_srai_epi32(index, 31), spread);
    _mm256_storeu_si256((__m256i *)x, spread);
}

static inline void compress32(const uint32_t *x, uint32_t m, uint32_t *values)
{
    permute_pack(x, &pack32_table[m], values);
}

static inline void expand32(const uint32_t *values, uint32_t m, uint32_t *x)
{
    permute_unpack(values, &unpack32_table[m], x);
}

static inline void compress64(const uint64_t *x, uint32_t m, uint64_t *values)
{
    permute_pack(x, &pack64_table[m], values);
}

static inline void expand64(const uint64_t *values, uint32_t m, uint64_t *x)
{
    permute_unpack(values, &unpack64_table[m], x);
}

FP_DEFINE_COUNT_BITS(avx2)
FP_DEFINE_PACK_LOOPS(avx2, 16, 8)
FP_DEFINE_PACK_LOOPS(avx2, 32, 8)
FP_DEFINE_PACK_LOOPS(avx2, 64, 4)

FP_TARGET_END
#endif
