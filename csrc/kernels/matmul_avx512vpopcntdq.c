/* Products with tiles on AVX-512 with vpopcntd, by which values are spread: on Zen 4 in a third of
 * vpexpand's time. */
#include "matmul.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "target.h"

FP_TARGET_BEGIN(FP_AVX512VPOPCNTDQ_FEATURES)

enum { FEW_CHAINS = 1, SPREADS_BOTH = 1 };

/* The number that belongs in a place is the count of the mask's bits below it. */
static inline __m512 spread(__m512 v, uint32_t bits, int part)
{
    __m512i below = _mm512_setr_epi32(0, 0x1, 0x3, 0x7, 0xf, 0x1f, 0x3f, 0x7f, 0xff, 0x1ff, 0x3ff,
                                      0x7ff, 0xfff, 0x1fff, 0x3fff, 0x7fff);
    if (part)
        below = _mm512_or_si512(_mm512_slli_epi32(below, 16), _mm512_set1_epi32(0xffff));
    __m512i index = _mm512_popcnt_epi32(_mm512_and_si512(_mm512_set1_epi32((int32_t)bits), below));
    return _mm512_maskz_permutexvar_ps((__mmask16)(bits >> 16 * part), index, v);
}

#include "matmul_avx512.h"

FP_DEFINE_MATMUL(avx512vpopcntdq);

FP_TARGET_END
#endif
