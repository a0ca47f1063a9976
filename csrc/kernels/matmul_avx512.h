/* Products with tiles, sixteen floats at a time: all but how values meet their places. A variant's
 * file includes <immintrin.h>, <string.h>, matmul.h and target.h, sets the target, defines
 *
 *     spread(v, mask, part): the first numbers of v in the places of the bits set in the part-th
 *         sixteen of mask, 0 elsewhere (part is a constant);
 *
 * includes this file, and then the loops as matmul_avx2.c does. */
enum { LANES = 16 };
typedef __m512 vector;

static inline vector load(const float *x)
{
    return _mm512_loadu_ps(x);
}

static inline void store(float *x, vector v)
{
    _mm512_storeu_ps(x, v);
}

static inline vector splat(float a)
{
    return _mm512_set1_ps(a);
}

static inline vector zero(void)
{
    return _mm512_setzero_ps();
}

static inline vector add(vector a, vector b)
{
    return _mm512_add_ps(a, b);
}

static inline vector muladd(vector a, vector b, vector c)
{
    return _mm512_fmadd_ps(a, b, c);
}

static inline size_t lowest_bit(uint64_t m)
{
    return _tzcnt_u64(m);
}

static inline __m256 halves_sum(vector a)
{
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

static inline void reduce4(vector a, vector b, vector c, vector d, float *y)
{
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(halves_sum(a), halves_sum(b)),
                                  _mm256_hadd_ps(halves_sum(c), halves_sum(d)));
    _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

static inline size_t mask_bits(const uint8_t *mask, int part)
{
    uint16_t bits;
    memcpy(&bits, mask + 2 * part, sizeof bits);
    return bits;
}

static inline vector widen_f16(__m256i values)
{
    return _mm512_cvtph_ps(values);
}

static inline vector widen_bf16(__m256i values)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

static inline vector widen_i8(__m128i values)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(values));
}

static inline vector expand_f32(const float *values, const uint8_t *mask, int part)
{
    return spread(_mm512_loadu_ps(values), mask, part);
}

static inline vector expand_f16(const uint16_t *values, const uint8_t *mask, int part)
{
    return spread(widen_f16(_mm256_loadu_si256((const __m256i *)values)), mask, part);
}

static inline vector expand_bf16(const uint16_t *values, const uint8_t *mask, int part)
{
    return spread(widen_bf16(_mm256_loadu_si256((const __m256i *)values)), mask, part);
}

static inline vector expand_i8(const int8_t *values, const uint8_t *mask, int part)
{
    return spread(widen_i8(_mm_loadu_si128((const __m128i *)values)), mask, part);
}
