/* Scores and masks, 32 elements at a time. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "pack_loop.h"
#include "score_loop.h"

FP_TARGET_BEGIN(FP_AVX2_FEATURES)

static inline void widen(const uint16_t *x, float *y)
{
    _mm256_storeu_ps(y, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x)));
}

static inline __m256i load_and(const float *s, uint32_t bits)
{
    __m256i v = _mm256_loadu_si256((const __m256i *)s);
    return _mm256_and_si256(v, _mm256_set1_epi32((int)bits));
}

/* 4 x 8 lanes, each 0 or -1, to 32 bytes; packing works within halves of registers, so the
 * order is 4 of a, 4 of b, 4 of c, 4 of d, then the upper halves. */
static inline __m256i narrow(__m256i a, __m256i b, __m256i c, __m256i d)
{
    return _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}

static inline uint32_t bits_in_order(__m256i narrowed)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return (uint32_t)_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(narrowed, order));
}

static inline size_t compare(const float *s, uint32_t limit, uint64_t *above)
{
    __m256i t = _mm256_set1_epi32((int)limit);
    __m256i a = load_and(s, 0x7fffffffu), b = load_and(s + 8, 0x7fffffffu);
    __m256i c = load_and(s + 16, 0x7fffffffu), d = load_and(s + 24, 0x7fffffffu);
    *above = bits_in_order(narrow(_mm256_cmpgt_epi32(a, t), _mm256_cmpgt_epi32(b, t),
                                  _mm256_cmpgt_epi32(c, t), _mm256_cmpgt_epi32(d, t)));
    __m256i equal = narrow(_mm256_cmpeq_epi32(a, t), _mm256_cmpeq_epi32(b, t),
                           _mm256_cmpeq_epi32(c, t), _mm256_cmpeq_epi32(d, t));
    return (size_t)_mm_popcnt_u32((uint32_t)_mm256_movemask_epi8(equal));
}

static inline uint64_t matches(const float *s, uint32_t high)
{
    __m256i h = _mm256_set1_epi32((int)(high << 16));
    return bits_in_order(narrow(_mm256_cmpeq_epi32(load_and(s, 0x7fff0000u), h),
                                _mm256_cmpeq_epi32(load_and(s + 8, 0x7fff0000u), h),
                                _mm256_cmpeq_epi32(load_and(s + 16, 0x7fff0000u), h),
                                _mm256_cmpeq_epi32(load_and(s + 24, 0x7fff0000u), h)));
}

FP_DEFINE_SCORE_LOOPS(avx2, 8, 32)
FP_DEFINE_KERNELS(avx2, avx2);

FP_TARGET_END
#endif
