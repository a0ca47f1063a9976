/* Scores and masks, 64 elements at a time. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "pack_loop.h"
#include "score_loop.h"

/* Without VBMI2 16-bit lanes would have to be widened and narrowed again, six operations on one
 * port for 16 of them: two byte shuffles from a table cost less. */
#define fp_pack16_avx512 fp_pack16_avx2
#define fp_unpack16_avx512 fp_unpack16_avx2

FP_TARGET_BEGIN(FP_AVX512_FEATURES)

static inline void widen(const uint16_t *x, float *y)
{
    _mm512_storeu_ps(y, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x)));
}

static inline __m512i load_and(const float *s, uint32_t bits)
{
    return _mm512_and_si512(_mm512_loadu_si512(s), _mm512_set1_epi32((int)bits));
}

static inline size_t compare(const float *s, uint32_t limit, uint64_t *above)
{
    __m512i t = _mm512_set1_epi32((int)limit);
    uint64_t equal = 0;
    *above = 0;
    FP_UNROLL
    for (unsigned j = 0; j < 64; j += 16) {
        __m512i v = load_and(s + j, 0x7fffffffu);
        *above |= (uint64_t)_mm512_cmpgt_epi32_mask(v, t) << j;
        equal |= (uint64_t)_mm512_cmpeq_epi32_mask(v, t) << j;
    }
    return (size_t)_mm_popcnt_u64(equal);
}

static inline uint64_t matches(const float *s, uint32_t high)
{
    __m512i h = _mm512_set1_epi32((int)(high << 16));
    uint64_t found = 0;
    FP_UNROLL
    for (unsigned j = 0; j < 64; j += 16)
        found |= (uint64_t)_mm512_cmpeq_epi32_mask(load_and(s + j, 0x7fff0000u), h) << j;
    return found;
}

FP_DEFINE_SCORE_LOOPS(avx512, 16, 64)
FP_DEFINE_KERNELS(avx512, avx512);
FP_DEFINE_KERNELS(avx512icl, avx512);

FP_TARGET_END
#endif
