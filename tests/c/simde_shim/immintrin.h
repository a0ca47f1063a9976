/* Stands in for the compiler's <immintrin.h>: SIMDe's portable versions of the intrinsics, so that
 * the AVX2 and AVX-512 kernels run on any x86-64 processor. Include path of one test build only. */
#ifndef FP_SIMDE_SHIM_H
#define FP_SIMDE_SHIM_H

#include <math.h>
#include <string.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_INLINE /* inlined, the loops take minutes to compile */
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include "kernels.h"
#include "target.h"

#undef FP_IN_REGISTER
#define FP_IN_REGISTER(v) (void)(v)

#undef FP_AVX2_FEATURES
#undef FP_AVX512_FEATURES
#undef FP_AVX512ICL_FEATURES
#define FP_AVX2_FEATURES "sse2"
#define FP_AVX512_FEATURES "sse2"
#define FP_AVX512ICL_FEATURES "sse2"

/* SIMDe's are not fused without the hardware. */
#define FP_SHIM_FMA(bits, lanes)                                                                   \
    static inline __m##bits fp_fmadd##bits(__m##bits a, __m##bits b, __m##bits c)                  \
    {                                                                                              \
        float x[lanes], y[lanes], z[lanes];                                                        \
        _mm##bits##_storeu_ps(x, a);                                                               \
        _mm##bits##_storeu_ps(y, b);                                                               \
        _mm##bits##_storeu_ps(z, c);                                                               \
        for (int i = 0; i < (lanes); i++)                                                          \
            x[i] = fmaf(x[i], y[i], z[i]);                                                         \
        return _mm##bits##_loadu_ps(x);                                                            \
    }
FP_SHIM_FMA(256, 8)
FP_SHIM_FMA(512, 16)
#undef _mm512_fmadd_ps
#define _mm256_fmadd_ps fp_fmadd256
#define _mm512_fmadd_ps fp_fmadd512

/* What SIMDe lacks. */
typedef uint8_t __mmask8;
typedef uint16_t __mmask16;
#define _cvtu64_mask64(m) ((uint64_t)(m))
#define _mm_popcnt_u32(m) __builtin_popcount(m)
#define _mm_popcnt_u64(m) __builtin_popcountll(m)
#define _tzcnt_u64(m) ((size_t)__builtin_ctzll(m)) /* of kernels, never 0 */
static inline uint64_t fp_bzhi(uint64_t m, size_t bits)
{
    return bits < 64 ? m & ((UINT64_C(1) << bits) - 1) : m;
}
#define _bzhi_u32(m, bits) ((uint32_t)fp_bzhi(m, bits))
#define _bzhi_u64 fp_bzhi

static inline __m512 fp_cvtph(__m256i x)
{
    uint16_t halves[16];
    float floats[16];
    _mm256_storeu_si256((__m256i *)halves, x);
    fp_half_to_float_scalar(halves, 16, floats);
    return _mm512_loadu_ps(floats);
}
#define _mm512_cvtph_ps fp_cvtph

#define FP_SHIM_EXPAND(bits, lanes)                                                                \
    static inline __m512i fp_expand##bits(uint32_t m, __m512i x)                                   \
    {                                                                                              \
        uint##bits##_t from[lanes], to[lanes];                                                     \
        _mm512_storeu_si512(from, x);                                                              \
        for (int i = 0, k = 0; i < (lanes); i++)                                                   \
            to[i] = m >> i & 1 ? from[k++] : 0;                                                    \
        return _mm512_loadu_si512(to);                                                             \
    }
FP_SHIM_EXPAND(32, 16)
FP_SHIM_EXPAND(64, 8)
#define _mm512_maskz_expand_epi32 fp_expand32
#define _mm512_maskz_expand_epi64 fp_expand64

static inline __m512 fp_expand_ps(__m512 before, uint32_t m, __m512 x)
{
    __m512 expanded = _mm512_castsi512_ps(fp_expand32(m, _mm512_castps_si512(x)));
    return _mm512_mask_mov_ps(before, (__mmask16)m, expanded);
}
#define _mm512_mask_expand_ps fp_expand_ps

static inline __m512 fp_cvtepi8_ps(__m128i x)
{
    int8_t from[16];
    float to[16];
    _mm_storeu_si128((__m128i *)from, x);
    for (int i = 0; i < 16; i++)
        to[i] = from[i];
    return _mm512_loadu_ps(to);
}
/* only ever one after the other */
#define _mm512_cvtepi8_epi32(x) (x)
#define _mm512_cvtepi32_ps fp_cvtepi8_ps

#define FP_SHIM_WIDEN(name, vector, type)                                                          \
    static inline __m512i name(vector x)                                                           \
    {                                                                                              \
        type from[16];                                                                             \
        uint32_t to[16];                                                                           \
        memcpy(from, &x, sizeof from);                                                             \
        for (int i = 0; i < 16; i++)                                                               \
            to[i] = from[i];                                                                       \
        return _mm512_loadu_si512(to);                                                             \
    }
FP_SHIM_WIDEN(fp_cvtepu16, __m256i, uint16_t)
FP_SHIM_WIDEN(fp_cvtepu8, __m128i, uint8_t)
#define _mm512_cvtepu16_epi32 fp_cvtepu16
#define _mm512_cvtepu8_epi32 fp_cvtepu8

#define FP_SHIM_MASKED_LOAD(name, vector, type, lanes)                                             \
    static inline vector name(uint32_t m, const void *x)                                           \
    {                                                                                              \
        type to[lanes];                                                                            \
        for (int i = 0; i < (lanes); i++)                                                          \
            to[i] = (type)(m >> i & 1 ? ((const type *)x)[i] : 0);                                 \
        vector v;                                                                                  \
        memcpy(&v, to, sizeof v);                                                                  \
        return v;                                                                                  \
    }
FP_SHIM_MASKED_LOAD(fp_masked_load_ps, __m512, float, 16)
FP_SHIM_MASKED_LOAD(fp_masked_load4_ps, __m128, float, 4)
FP_SHIM_MASKED_LOAD(fp_masked_load_epi16, __m256i, uint16_t, 16)
FP_SHIM_MASKED_LOAD(fp_masked_load_epi8, __m128i, uint8_t, 16)
#define _mm512_maskz_loadu_ps fp_masked_load_ps
#define _mm_maskz_loadu_ps fp_masked_load4_ps
#define _mm256_maskz_loadu_epi16 fp_masked_load_epi16
#define _mm_maskz_loadu_epi8 fp_masked_load_epi8

static inline __m256i fp_compress(__m256i rest, uint32_t m, __m256i x)
{
    uint8_t from[32], to[32];
    _mm256_storeu_si256((__m256i *)from, x);
    _mm256_storeu_si256((__m256i *)to, rest);
    for (int i = 0, k = 0; i < 32; i++)
        if (m >> i & 1)
            to[k++] = from[i];
    return _mm256_loadu_si256((const __m256i *)to);
}
#define _mm256_mask_compress_epi8 fp_compress

static inline __m512 fp_mask3_fmadd(__m512 a, __m512 b, __m512 c, __mmask16 m)
{
    return _mm512_mask_mov_ps(c, m, _mm512_fmadd_ps(a, b, c));
}
#define _mm512_mask3_fmadd_ps fp_mask3_fmadd

/* Lanes of four: two of a and two of b, each by two bits of `which`. */
static inline __m512 fp_shuffle_f32x4(__m512 a, __m512 b, int which)
{
    float from[2][16], to[16];
    _mm512_storeu_ps(from[0], a);
    _mm512_storeu_ps(from[1], b);
    for (int i = 0; i < 4; i++)
        memcpy(to + 4 * i, from[i / 2] + 4 * (which >> 2 * i & 3), 4 * sizeof *to);
    return _mm512_loadu_ps(to);
}
#define _mm512_shuffle_f32x4 fp_shuffle_f32x4

static inline __m512 fp_permute_ps(__m512 x, int which)
{
    float from[16], to[16];
    _mm512_storeu_ps(from, x);
    for (int i = 0; i < 16; i++)
        to[i] = from[i / 4 * 4 + (which >> i % 4 * 2 & 3)];
    return _mm512_loadu_ps(to);
}
#define _mm512_permute_ps fp_permute_ps

static inline __m512 fp_compress_ps(uint32_t m, __m512 x)
{
    float from[16], to[16] = {0};
    _mm512_storeu_ps(from, x);
    for (int i = 0, k = 0; i < 16; i++)
        if (m >> i & 1)
            to[k++] = from[i];
    return _mm512_loadu_ps(to);
}
#define _mm512_maskz_compress_ps fp_compress_ps

static inline void fp_masked_store_ps(float *to, uint32_t m, __m128 x)
{
    float from[4];
    _mm_storeu_ps(from, x);
    for (int i = 0; i < 4; i++)
        if (m >> i & 1)
            to[i] = from[i];
}
#define _mm_mask_storeu_ps fp_masked_store_ps

#endif
