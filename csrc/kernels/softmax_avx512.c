/* Exponentials of a softmax row, 16 lanes. */
#include "softmax.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "softmax_loop.h"

FP_TARGET_BEGIN(FP_AVX512_FEATURES)

typedef __m512 row;

#define load(p) _mm512_loadu_ps(p)
#define store(p, v) _mm512_storeu_ps(p, v)
#define broadcast(x) _mm512_set1_ps(x)
#define add(v, w) _mm512_add_ps(v, w)
#define subtract(v, w) _mm512_sub_ps(v, w)
#define multiply(v, w) _mm512_mul_ps(v, w)
#define fma_row(u, v, w) _mm512_fmadd_ps(u, v, w)
#define most(v, w) _mm512_max_ps(v, w)

static inline row replace(row v, row mask, row w)
{
    return _mm512_mask_mov_ps(v, _mm512_movepi32_mask(_mm512_castps_si512(mask)), w);
}

static inline row power(row v)
{
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(v), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(127 << 23)));
}

static inline row keep(row v, row x, row least)
{
    return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(x, least, _CMP_LT_OQ), _mm512_setzero_ps());
}

static inline __m256 upper(row v)
{
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}

static inline float halves_sum(row v)
{
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), upper(v));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

static inline float halves_most(row v)
{
    __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), upper(v));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

FP_DEFINE_SOFTMAX_LOOPS(avx512)

FP_TARGET_END
#endif
