/* Products with tiles, eight floats at a time. */
#include "matmul.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "pack_tables.h"
#include "target.h"

FP_TARGET_BEGIN(FP_AVX2_FEATURES)

enum { LANES = 8, WIDTH = FP_WIDTH_USUAL };
typedef __m256 vector;

static inline vector load(const float *x)
{
    return _mm256_loadu_ps(x);
}

static inline void store(float *x, vector v)
{
    _mm256_storeu_ps(x, v);
}

static inline vector splat(float a)
{
    return _mm256_set1_ps(a);
}

static inline vector zero(void)
{
    return _mm256_setzero_ps();
}

static inline vector add(vector a, vector b)
{
    return _mm256_add_ps(a, b);
}

static inline vector muladd(vector a, vector b, vector c)
{
    return _mm256_fmadd_ps(a, b, c);
}

static inline vector muladd_if(int is, vector a, vector b, vector c)
{
    return is ? muladd(a, b, c) : c;
}

static inline size_t lowest_bit(uint64_t m)
{
    return _tzcnt_u64(m);
}

static inline __m128 lane_sums(vector a, vector b, vector c, vector d)
{
    vector pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

static inline void reduce4(vector a, vector b, vector c, vector d, float *y)
{
    _mm_storeu_ps(y, lane_sums(a, b, c, d));
}

/* Masked stores are slow on AMD's processors. */
static inline void reduce4_add(vector a, vector b, vector c, vector d, float *y, int n)
{
    float sums[4];
    if (n >= 4) {
        _mm_storeu_ps(y, _mm_add_ps(_mm_loadu_ps(y), lane_sums(a, b, c, d)));
        return;
    }
    reduce4(a, b, c, d, sums);
    for (int i = 0; i < n; i++)
        y[i] += sums[i];
}

/* By halves of four lanes, each from values of its own: shuffles within a half are four times as
 * fast as vpermps, and write the zeros too. A table entry has the byte indices of both halves. */
#define HALVES(m, W)                                                                               \
    {FP_UNPACK_WORD((m) & 15, W, 0), FP_UNPACK_WORD((m) & 15, W, 1),                               \
     FP_UNPACK_WORD((m) >> 4, W, 0), FP_UNPACK_WORD((m) >> 4, W, 1)}
static const uint64_t expand_table[256][4] = {FP_TABLE_256(HALVES, 4)};

static inline vector expand(__m256i halves, size_t bits)
{
    const __m256i *entry = (const __m256i *)expand_table[bits];
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(halves, _mm256_loadu_si256(entry)));
}

static inline size_t mask_bits(const uint8_t *mask, int part)
{
    return mask[part];
}

/* Of the first four lanes: where the values of the others begin. */
static inline size_t low_count(size_t bits)
{
    return (size_t)_mm_popcnt_u64(_bzhi_u64(bits, 4));
}

static inline vector expand_f32(const float *values, const uint8_t *mask, int part)
{
    size_t bits = mask_bits(mask, part);
    __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)values));
    const __m128i *high = (const __m128i *)(values + low_count(bits));
    return expand(_mm256_inserti128_si256(low, _mm_loadu_si128(high), 1), bits);
}

static inline __m128i load_halves(const uint16_t *values, size_t bits)
{
    __m128i low = _mm_loadl_epi64((const __m128i *)values);
    const uint16_t *high = values + low_count(bits);
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(low), (const __m64 *)high));
}

static inline vector expand_f16(const uint16_t *values, const uint8_t *mask, int part)
{
    size_t bits = mask_bits(mask, part);
    vector wide = _mm256_cvtph_ps(load_halves(values, bits));
    return expand(_mm256_castps_si256(wide), bits);
}

static inline vector expand_bf16(const uint16_t *values, const uint8_t *mask, int part)
{
    size_t bits = mask_bits(mask, part);
    __m256i wide = _mm256_cvtepu16_epi32(load_halves(values, bits));
    return expand(_mm256_slli_epi32(wide, 16), bits);
}

static inline vector expand_i8(const int8_t *values, const uint8_t *mask, int part)
{
    size_t bits = mask_bits(mask, part);
    int32_t low, high;
    memcpy(&low, values, sizeof low);
    memcpy(&high, values + low_count(bits), sizeof high);
    __m128i both = _mm_insert_epi32(_mm_cvtsi32_si128(low), high, 1);
    vector wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(both));
    return expand(_mm256_castps_si256(wide), bits);
}

/* On a Zen 3 a row of a tile takes 87, 151, 281 and 417 cycles for 16, 32, 64 and 96 tokens if it
 * is expanded, else 3.6, 3.8, 5 and 7.3 for each kept value. */
#define EXPANDS
static inline size_t expand_from(size_t width)
{
    return width <= 16 ? 25 : width <= 32 ? 40 : width <= 48 ? 50 : width <= 64 ? 55 : 58;
}

#include "matmul_loop.h"
#include "matmul_vector.h"

/* Eight rows of eight to eight columns. */
static inline void transpose8(const float *x, size_t x_stride, float *y, size_t y_stride)
{
    vector a[8], b[8];
    FP_UNROLL
    for (int i = 0; i < 4; i++) { /* rows i and i + 4 side by side, by halves */
        a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x + x_stride * (size_t)i)),
                                    _mm_loadu_ps(x + x_stride * (size_t)(i + 4)), 1);
        a[i + 4] =
            _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x + x_stride * (size_t)i + 4)),
                                 _mm_loadu_ps(x + x_stride * (size_t)(i + 4) + 4), 1);
    }
    FP_UNROLL
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
        b[i + 2] = _mm256_unpacklo_ps(a[i + 2], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
        store(y + y_stride * (size_t)i, _mm256_shuffle_ps(b[i], b[i + 2], 0x44));
        store(y + y_stride * (size_t)(i + 1), _mm256_shuffle_ps(b[i], b[i + 2], 0xee));
        store(y + y_stride * (size_t)(i + 2), _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44));
        store(y + y_stride * (size_t)(i + 3), _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee));
    }
}

/* Lines of the side with the longer stride are finished one after the other: its rows may all fall
 * into the same few places of the first cache. */
void fp_transpose_avx2(const float *x, size_t x_stride, size_t rows, size_t cols, float *y,
                       size_t y_stride)
{
    size_t whole_rows = rows / 8 * 8, whole_cols = cols / 8 * 8;
    if (x_stride >= y_stride) {
        for (size_t i = 0; i < whole_rows; i += 8)
            for (size_t j = 0; j < whole_cols; j += 8)
                transpose8(x + i * x_stride + j, x_stride, y + j * y_stride + i, y_stride);
    } else {
        for (size_t j = 0; j < whole_cols; j += 8)
            for (size_t i = 0; i < whole_rows; i += 8)
                transpose8(x + i * x_stride + j, x_stride, y + j * y_stride + i, y_stride);
    }
    fp_transpose_scalar(x + whole_cols, x_stride, whole_rows, cols - whole_cols,
                        y + whole_cols * y_stride, y_stride);
    fp_transpose_scalar(x + whole_rows * x_stride, x_stride, rows - whole_rows, cols,
                        y + whole_rows, y_stride);
}

FP_DEFINE_MATMUL(avx2);

FP_TARGET_END
#endif
