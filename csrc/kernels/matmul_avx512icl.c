/* Products with tiles on AVX-512 as of Ice Lake. */
#include "matmul.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "target.h"

FP_TARGET_BEGIN(FP_AVX512ICL_FEATURES)

#include "matmul_avx512.h"
#include "matmul_loop.h"

/* ---- of which little is kept: x comes to the values -------------------------------------- */

enum { HALF = FP_TILE / 2, MOST_GATHERED = 2 }; /* fifths; of more, many halves take two turns */

static inline int gathers(const uint64_t *mask, size_t rows)
{
    size_t kept = 0;
    for (size_t i = 0; i < rows; i++) /* compilers make vectors of it */
        kept += (size_t)__builtin_popcountll(mask[i]);
    return kept * 5 <= MOST_GATHERED * rows * FP_TILE;
}

/* As many values as there are bits set in n, from the lowest; 0 after them. */
static inline __m512 first_f32(const float *values, __mmask16 n)
{
    return _mm512_maskz_loadu_ps(n, values);
}

static inline __m512 first_f16(const uint16_t *values, __mmask16 n)
{
    return widen_f16(_mm256_maskz_loadu_epi16(n, values));
}

static inline __m512 first_bf16(const uint16_t *values, __mmask16 n)
{
    return widen_bf16(_mm256_maskz_loadu_epi16(n, values));
}

static inline __m512 first_i8(const int8_t *values, __mmask16 n)
{
    return widen_i8(_mm_maskz_loadu_epi8(n, values));
}

/* The numbers of the bits that are set; others after them. On Zen 4 the instruction waits for what
 * was in its result's register, even to zero it: for constants there is no wait. */
static inline __m256i columns_of(uint32_t bits)
{
    const __m256i all =
        _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
                         21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
    return _mm256_mask_compress_epi8(all, bits, all);
}

/* For every token: sum += w x at the first `kept` of the columns, which are of one half. */
INLINE void add_gathered(__m512 w, __m128i columns, uint32_t kept, int half, __m512 (*x)[4],
                         __m512 *sum, const size_t tokens)
{
    __m512i at = _mm512_cvtepu8_epi32(columns);
    __mmask16 n = (__mmask16)_bzhi_u32(0xffff, kept);
    FP_UNROLL
    for (size_t t = 0; t < tokens; t++) {
        __m512 met = _mm512_maskz_permutex2var_ps(n, x[t][2 * half], at, x[t][2 * half + 1]);
        sum[t] = _mm512_fmadd_ps(w, met, sum[t]);
    }
}

/* As expanded_<suffix>. By halves of a row, whose values nearly always are no more than sixteen. */
#define DEFINE_GATHERED(type, suffix)                                                              \
    INLINE const type *gathered_##suffix(const uint64_t *mask, size_t rows, const type *values,    \
                                         const float *from, size_t stride, __m512 *sums,           \
                                         const size_t tokens)                                      \
    {                                                                                              \
        __m512 x[FP_VECTOR_TOKENS][4];                                                             \
        FP_UNROLL                                                                                  \
        for (size_t v = 0; v < 4 * tokens; v++)                                                    \
            x[v / 4][v % 4] = _mm512_loadu_ps(from + stride * (v / 4) + 16 * (v % 4));             \
        for (size_t i = 0; i < rows; i++, sums += tokens) {                                        \
            __m512 sum[FP_VECTOR_TOKENS];                                                          \
            FP_UNROLL                                                                              \
            for (size_t t = 0; t < tokens; t++)                                                    \
                sum[t] = sums[t];                                                                  \
            FP_UNROLL                                                                              \
            for (int half = 0; half < 2; half++) {                                                 \
                uint32_t bits = (uint32_t)(mask[i] >> HALF * half);                                \
                fp_ask_ahead(values);                                                              \
                uint32_t kept = (uint32_t)_mm_popcnt_u32(bits);                                    \
                __m256i columns = columns_of(bits);                                                \
                __m512 w = first_##suffix(values, (__mmask16)_bzhi_u32(0xffff, kept));             \
                add_gathered(w, _mm256_castsi256_si128(columns), kept, half, x, sum, tokens);      \
                if (__builtin_expect(kept > 16, 0)) {                                              \
                    w = first_##suffix(values + 16, (__mmask16)_bzhi_u32(0xffff, kept - 16));      \
                    add_gathered(w, _mm256_extracti128_si256(columns, 1), kept - 16, half, x, sum, \
                                 tokens);                                                          \
                }                                                                                  \
                values += kept;                                                                    \
            }                                                                                      \
            FP_UNROLL                                                                              \
            for (size_t t = 0; t < tokens; t++)                                                    \
                sums[t] = sum[t];                                                                  \
        }                                                                                          \
        return values;                                                                             \
    }

DEFINE_GATHERED(float, f32)
DEFINE_GATHERED(uint16_t, f16)
DEFINE_GATHERED(uint16_t, bf16)
DEFINE_GATHERED(int8_t, i8)

#define TILE(suffix, mask, rows, values, x, stride, sums, tokens, chains)                          \
    gathers(mask, rows) ? gathered_##suffix(mask, rows, values, x, stride, sums, tokens)           \
                        : expanded_##suffix(mask, rows, values, x, stride, sums, tokens, chains)

#include "matmul_vector.h"

FP_DEFINE_MATMUL(avx512icl);

FP_TARGET_END
#endif
