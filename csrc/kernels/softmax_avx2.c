/* Exponentials of a softmax row, 2 x 8 lanes. */
#include "softmax.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "softmax_loop.h"

FP_TARGET_BEGIN(FP_AVX2_FEATURES)

typedef struct row {
    __m256 low, high;
} row;

static inline row load(const float *p)
{
    return (row){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

static inline void store(float *p, row v)
{
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
}

static inline row broadcast(float x)
{
    return (row){_mm256_set1_ps(x), _mm256_set1_ps(x)};
}

static inline row add(row v, row w)
{
    return (row){_mm256_add_ps(v.low, w.low), _mm256_add_ps(v.high, w.high)};
}

static inline row subtract(row v, row w)
{
    return (row){_mm256_sub_ps(v.low, w.low), _mm256_sub_ps(v.high, w.high)};
}

static inline row multiply(row v, row w)
{
    return (row){_mm256_mul_ps(v.low, w.low), _mm256_mul_ps(v.high, w.high)};
}

static inline row fma_row(row u, row v, row w)
{
    return (row){_mm256_fmadd_ps(u.low, v.low, w.low), _mm256_fmadd_ps(u.high, v.high, w.high)};
}

static inline row most(row v, row w)
{
    return (row){_mm256_max_ps(v.low, w.low), _mm256_max_ps(v.high, w.high)};
}

static inline row replace(row v, row mask, row w)
{
    return (row){_mm256_blendv_ps(v.low, w.low, mask.low),
                 _mm256_blendv_ps(v.high, w.high, mask.high)};
}

static inline __m256 power8(__m256 v)
{
    __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(v), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(127 << 23)));
}

static inline row power(row v)
{
    return (row){power8(v.low), power8(v.high)};
}

static inline row keep(row v, row x, row least)
{
    return (row){_mm256_andnot_ps(_mm256_cmp_ps(x.low, least.low, _CMP_LT_OQ), v.low),
                 _mm256_andnot_ps(_mm256_cmp_ps(x.high, least.high, _CMP_LT_OQ), v.high)};
}

static inline float halves_sum(row v)
{
    __m256 eight = _mm256_add_ps(v.low, v.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

static inline float halves_most(row v)
{
    __m256 eight = _mm256_max_ps(v.low, v.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

FP_DEFINE_SOFTMAX_LOOPS(avx2)

FP_TARGET_END
#endif
