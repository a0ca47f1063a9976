/* Products with tiles, sixteen floats at a time: all but how values meet their places. A variant's
 * file includes <immintrin.h>, <string.h>, matmul.h and target.h, sets the target, includes this
 * file, and then the loops as matmul_avx2.c does. */
enum { LANES = 16, WIDTH = FP_WIDTH_MAX, NARROW = FP_WIDTH_USUAL / LANES };
#define TWO_CHAINS
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

/* Loads of vectors take up all of Zen 4's ports for them, but integers have one of their own.
 * Wider tiles are for other processors. */
static inline vector splat_weight(float a, int vectors)
{
    int32_t bits;
    if (vectors > NARROW)
        return splat(a);
    memcpy(&bits, &a, sizeof bits);
    FP_ADDRESS(bits);
    return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
}

/* Zen 4 takes four cycles for a multiply-add and begins one in each, so that five or six vectors
 * need no second chain, whose odd step costs; processors with wider tiles begin two. */
static inline int chains_of(int vectors)
{
    return vectors > 4 && vectors <= NARROW ? 1 : 2;
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

static inline vector muladd_if(int is, vector a, vector b, vector c)
{
    return _mm512_mask3_fmadd_ps(a, b, c, (__mmask16)-is);
}

static inline size_t lowest_bit(uint64_t m)
{
    return _tzcnt_u64(m);
}

/* The halves of a added, then those of b. */
static inline __m512 halves_sums(vector a, vector b)
{
    return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}

static inline __m128 lane_sums(vector a, vector b, vector c, vector d)
{
    __m512 ab = halves_sums(a, b), cd = halves_sums(c, d);
    __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88),
                               _mm512_shuffle_f32x4(ab, cd, 0xdd)); /* four lanes for each */
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
    return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, sum));
}

static inline void reduce4(vector a, vector b, vector c, vector d, float *y)
{
    _mm_storeu_ps(y, lane_sums(a, b, c, d));
}

static inline void reduce4_add(vector a, vector b, vector c, vector d, float *y, int n)
{
    __mmask8 first = (__mmask8)_bzhi_u32(0xf, (uint32_t)n);
    __m128 before = _mm_maskz_loadu_ps(first, y);
    _mm_mask_storeu_ps(y, first, _mm_add_ps(before, lane_sums(a, b, c, d)));
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

/* The first numbers of v in the places of the bits set in the part-th sixteen of mask, 0 elsewhere
 * (part is a constant). On Zen 4 the instruction waits for what was in its result's register, even
 * to zero it: for a zero that is there already is no wait. */
static inline vector spread(vector v, const uint8_t *mask, int part)
{
    uint64_t word; /* shifted where it is used, which takes less than loading each part */
    vector zeros = zero();
    FP_IN_REGISTER(zeros);
    memcpy(&word, mask, sizeof word);
    __mmask16 kept = (__mmask16)_kshiftri_mask64(_cvtu64_mask64(word), 16 * part);
    return _mm512_mask_expand_ps(zeros, kept, v);
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
