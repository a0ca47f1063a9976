/* Pack and unpack with vpcompress and vpexpand, in registers: storing through vpcompress is
 * microcode on Zen 4. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "pack_loop.h"

FP_TARGET_BEGIN(FP_AVX512_FEATURES)

static inline size_t count16(uint32_t m)
{
    return (size_t)_mm_popcnt_u32(m);
}

static inline size_t count8(uint32_t m)
{
    return (size_t)_mm_popcnt_u32(m);
}

static inline void compress32(const uint32_t *x, uint32_t m, uint32_t *values)
{
    __m512i packed = _mm512_maskz_compress_epi32((__mmask16)m, _mm512_loadu_si512(x));
    _mm512_storeu_si512(values, packed);
}

static inline void expand32(const uint32_t *values, uint32_t m, uint32_t *x)
{
    __m512i spread = _mm512_maskz_expand_epi32((__mmask16)m, _mm512_loadu_si512(values));
    _mm512_storeu_si512(x, spread);
}

static inline void compress64(const uint64_t *x, uint32_t m, uint64_t *values)
{
    __m512i packed = _mm512_maskz_compress_epi64((__mmask8)m, _mm512_loadu_si512(x));
    _mm512_storeu_si512(values, packed);
}

static inline void expand64(const uint64_t *values, uint32_t m, uint64_t *x)
{
    __m512i spread = _mm512_maskz_expand_epi64((__mmask8)m, _mm512_loadu_si512(values));
    _mm512_storeu_si512(x, spread);
}

FP_DEFINE_COUNT_BITS(avx512)
FP_DEFINE_PACK_LOOPS(avx512, 32, 16)
FP_DEFINE_PACK_LOOPS(avx512, 64, 8)

FP_TARGET_END
#endif
