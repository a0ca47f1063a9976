/* Products with tiles on AVX-512 with vpopcntd, by which values are spread: on Zen 4 in a third of
 * vpexpand's time. */
#include "matmul.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "target.h"

FP_TARGET_BEGIN(FP_AVX512VPOPCNTDQ_FEATURES)

/* The number that belongs in a place is the count of the mask's bits below it. */
static inline __m512 spread(__m512 v, const uint8_t *mask, int part)
{
    uint64_t word; /* shifted where it is used, which takes less than loading each part */
    int32_t pair;  /* of parts, so that two share its broadcast */
    memcpy(&word, mask, sizeof word);
    memcpy(&pair, mask + part / 2 * 4, sizeof pair);
    __m512i below = _mm512_setr_epi32(0, 0x1, 0x3, 0x7, 0xf, 0x1f, 0x3f, 0x7f, 0xff, 0x1ff, 0x3ff,
                                      0x7ff, 0xfff, 0x1fff, 0x3fff, 0x7fff);
    if (part & 1)
        below = _mm512_slli_epi32(below, 16);
    __m512i index = _mm512_popcnt_epi32(_mm512_and_si512(_mm512_set1_epi32(pair), below));
    __mmask16 kept = (__mmask16)_kshiftri_mask64(_cvtu64_mask64(word), 16 * part);
    return _mm512_maskz_permutexvar_ps(kept, index, v);
}

#include "matmul_avx512.h"

FP_DEFINE_MATMUL(avx512vpopcntdq);

FP_TARGET_END
#endif
