/* Every kernel variant against the scalar one: same bytes, nothing touched outside the ranges. */
#include <math.h>

#include "testing.h"
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

/* ---- pack and unpack ----------------------------------------------------------------- */

static void pack(const fp_kernels *k, size_t item, const buffer *x, const uint8_t *mask, size_t n,
                 buffer *values, size_t room)
{
    const void *from = x->data;
    void *to = values->data;
    if (item == 2)
        k->pack16(from, mask, n, to, room);
    else if (item == 4)
        k->pack32(from, mask, n, to, room);
    else
        k->pack64(from, mask, n, to, room);
}

static void unpack(const fp_kernels *k, size_t item, const buffer *values, size_t kept,
                   const uint8_t *mask, size_t n, buffer *x)
{
    const void *from = values->data;
    void *to = x->data;
    if (item == 2)
        k->unpack16(from, kept, mask, n, to);
    else if (item == 4)
        k->unpack32(from, kept, mask, n, to);
    else
        k->unpack64(from, kept, mask, n, to);
}

enum { NONE, ONE_BIT, TENTH, THIRD, HALF, MOST, ALL, BLOCKS, DENSITIES };

/* Returns the number of set bits. */
static size_t fill_mask(uint8_t *mask, size_t n, int density)
{
    static const double chance[DENSITIES] = {0, 0, 0.1, 0.3, 0.5, 0.9, 1, 0};
    size_t kept = 0, one = n ? random_bits() % n : 0;
    memset(mask, 0, (n + 7) / 8);
    for (size_t i = 0; i < n; i++) {
        int bit = random_bits() < chance[density] * 4294967296.0;
        if (density == ONE_BIT)
            bit = i == one;
        if (density == BLOCKS)
            bit = (i + one) / 40 % 3 == 0;
        mask[i / 8] |= (uint8_t)(bit << i % 8);
        kept += (size_t)bit;
    }
    return kept;
}

static void test_pack_case(size_t n, size_t item, int density, int guarded)
{
    buffer x = buffer_new(n * item, item, 0), mask = buffer_new((n + 7) / 8, 1, 0);
    for (size_t i = 0; i < x.size; i++)
        x.data[i] = (uint8_t)(random_bits() | 1); /* no zero among the kept */
    size_t kept = fill_mask(mask.data, n, density), k = 0;

    /* by the definition, element by element */
    uint8_t *packed = malloc(kept * item + 1), *spread = calloc(n + 1, item);
    if (!packed || !spread)
        abort();
    for (size_t i = 0; i < n; i++)
        if (mask.data[i / 8] >> i % 8 & 1) {
            memcpy(packed + item * k++, x.data + item * i, item);
            memcpy(spread + item * i, x.data + item * i, item);
        }

    for (size_t a = 0; a < variant_count; a++) {
        buffer values = buffer_new(kept * item, item, guarded);
        pack(variants[a], item, &x, mask.data, n, &values, kept);
        CHECK(same(&values, packed) && intact(&values), "%s pack n=%zu item=%zu density=%d",
              variants[a]->name, n, item, density);
        buffer exact = buffer_copy(values.data, values.size, item);
        for (size_t b = 0; b < variant_count; b++) {
            buffer back = buffer_new(n * item, item, guarded);
            unpack(variants[b], item, &exact, kept, mask.data, n, &back);
            CHECK(same(&back, spread) && intact(&back), "%s to %s n=%zu item=%zu density=%d",
                  variants[a]->name, variants[b]->name, n, item, density);
            free(back.block);
        }
        free(exact.block);
        free(values.block);

        size_t more = random_bits() % 100; /* what follows the values may be anything, not beyond */
        buffer room = buffer_new((kept + more) * item, item, guarded);
        pack(variants[a], item, &x, mask.data, n, &room, kept + more);
        CHECK(!memcmp(room.data, packed, kept * item) && intact(&room),
              "%s room for %zu more n=%zu item=%zu density=%d", variants[a]->name, more, n, item,
              density);
        free(room.block);
    }

    /* a mask with more bits than values: zeros, and no read past the values */
    size_t fewer = kept ? random_bits() % kept : 0;
    buffer values = buffer_copy(packed, fewer * item, item);
    k = 0;
    for (size_t i = 0; i < n; i++)
        if (mask.data[i / 8] >> i % 8 & 1 && k++ >= fewer)
            memset(spread + item * i, 0, item);
    for (size_t a = 0; a < variant_count; a++) {
        buffer back = buffer_new(n * item, item, guarded);
        unpack(variants[a], item, &values, fewer, mask.data, n, &back);
        CHECK(same(&back, spread) && intact(&back), "%s corrupt n=%zu item=%zu density=%d",
              variants[a]->name, n, item, density);
        free(back.block);

        buffer cut = buffer_new(fewer * item, item, guarded);
        pack(variants[a], item, &x, mask.data, n, &cut, fewer);
        CHECK(same(&cut, packed) && intact(&cut), "%s cut short n=%zu item=%zu density=%d",
              variants[a]->name, n, item, density);
        free(cut.block);
    }
    free(values.block);
    free(packed);
    free(spread);
    free(x.block);
    free(mask.block);
}

static const size_t large[] = {1000, 4096, 4097, 8191, 65536 + 37};
enum { SMALL = 301, LARGE = sizeof large / sizeof large[0] };

static size_t nth_size(size_t i)
{
    return i < SMALL ? i : large[i - SMALL];
}

static void test_pack(void)
{
    for (size_t i = 0; i < SMALL + LARGE; i++)
        for (size_t item = 2; item <= 8; item *= 2)
            for (int density = 0; density < DENSITIES; density++)
                for (int guarded = 0; guarded < 2; guarded++)
                    test_pack_case(nth_size(i), item, density, guarded);
}

/* ---- half to float ------------------------------------------------------------------- */

static float half_value(uint16_t h)
{
    int exponent = h >> 10 & 0x1f, mantissa = h & 0x3ff;
    float sign = h & 0x8000 ? -1.0f : 1.0f;
    return sign * (exponent ? ldexpf((float)(mantissa + 1024), exponent - 25)
                            : ldexpf((float)mantissa, -24));
}

static void test_half_case(const uint16_t *from, size_t n, int guarded)
{
    buffer x = buffer_copy(from, 2 * n, 2);
    float *expected = malloc(4 * n + 1);
    if (!expected)
        abort();
    fp_half_to_float_scalar((const void *)x.data, n, expected);
    for (size_t a = 0; a < variant_count; a++) {
        buffer y = buffer_new(4 * n, 4, guarded);
        variants[a]->half_to_float((const void *)x.data, n, (void *)y.data);
        CHECK(same(&y, expected) && intact(&y), "%s n=%zu", variants[a]->name, n);
        free(y.block);
    }
    free(expected);
    free(x.block);
}

static void test_half_to_float(void)
{
    static uint16_t all[65536];
    static float expected[65536];
    for (size_t i = 0; i < 65536; i++)
        all[i] = (uint16_t)i;
    fp_half_to_float_scalar(all, 65536, expected);
    for (size_t i = 0; i < 65536; i++) {
        float value = half_value(all[i]);
        if ((i & 0x7c00) != 0x7c00)
            CHECK(!memcmp(&value, &expected[i], 4), "half %04zx is %a", i, (double)expected[i]);
    }
    for (int guarded = 0; guarded < 2; guarded++) {
        test_half_case(all, 65536, guarded);
        for (size_t n = 0; n < SMALL; n++)
            test_half_case(all + random_bits() % (65536 - n), n, guarded);
    }
}

/* ---- mask_above ---------------------------------------------------------------------- */

static float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Few magnitudes of either sign, so that every one ties often. */
static const uint32_t magnitudes[] = {0,          1,          2,          0x7fffff,   0x800000,
                                      0x3f7fffff, 0x3f800000, 0x3f800001, 0x7f7fffff, 0x7f800000};
enum { MAGNITUDES = sizeof magnitudes / sizeof magnitudes[0] };

static void test_mask_case(size_t n, float threshold, int guarded)
{
    buffer s = buffer_new(4 * n, 4, 0);
    float *values = (float *)(void *)s.data;
    uint8_t *expected = calloc(n / 8 + 1, 1);
    size_t expected_ties = 0;
    if (!expected)
        abort();
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = magnitudes[random_bits() % MAGNITUDES] | (random_bits() & 0x80000000u);
        values[i] = from_bits(bits);
        if (!signbit(threshold)) { /* as numbers: what the integers stand for */
            expected[i / 8] |= (uint8_t)((fabsf(values[i]) > threshold) << i % 8);
            expected_ties += fabsf(values[i]) == threshold;
        }
    }
    for (size_t a = 0; a < variant_count; a++) {
        buffer mask = buffer_new((n + 7) / 8, 1, guarded);
#if defined(__x86_64__)
        unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8040u); /* subnormals read and written as zero */
#endif
        size_t ties = variants[a]->mask_above(values, n, threshold, mask.data);
#if defined(__x86_64__)
        _mm_setcsr(mode);
#endif
        CHECK(ties == expected_ties && same(&mask, expected) && intact(&mask),
              "%s n=%zu threshold=%a", variants[a]->name, n, (double)threshold);
        free(mask.block);
    }
    free(expected);
    free(s.block);
}

static void test_mask_above(void)
{
    for (size_t i = 0; i < SMALL + LARGE; i++)
        for (int guarded = 0; guarded < 2; guarded++) {
            for (size_t t = 0; t < MAGNITUDES; t++)
                test_mask_case(nth_size(i), from_bits(magnitudes[t]), guarded);
            test_mask_case(nth_size(i), -0.0f, guarded);
        }
}

/* ---- histogram_low ------------------------------------------------------------------- */

static void test_histogram_case(size_t n, uint32_t high, unsigned one_in)
{
    static uint32_t expected[65536];
    buffer s = buffer_new(4 * n, 4, 0);
    memset(expected, 0, sizeof expected);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = random_bits();
        if (random_bits() % one_in == 0) /* a match, often the same one, of either sign */
            bits = (bits & 0x80000003u) | (high & 0x7fffu) << 16;
        memcpy(s.data + 4 * i, &bits, 4);
        if ((bits >> 16 & 0x7fffu) == high)
            expected[bits & 0xffffu]++;
    }
    for (size_t a = 0; a < variant_count; a++) {
        buffer histogram = buffer_new(sizeof expected, 4, 1);
        memset(histogram.data, 0, sizeof expected);
        variants[a]->histogram_low((const void *)s.data, n, high, (void *)histogram.data);
        CHECK(same(&histogram, expected) && intact(&histogram), "%s n=%zu high=%x",
              variants[a]->name, n, (unsigned)high);
        free(histogram.block);
    }
    free(s.block);
}

static void test_histogram_low(void)
{
    static const uint32_t highs[] = {0, 1, 0x3f80, 0x7f80, 0x7fff, 0x8000, 0x10000, 0xffffffffu};
    for (size_t i = 0; i < SMALL + LARGE; i++)
        for (size_t h = 0; h < sizeof highs / sizeof highs[0]; h++)
            test_histogram_case(nth_size(i), highs[h], i % 2 ? 50 : 2);
}

static void test_count_bits(void)
{
    for (size_t bytes = 0; bytes < 70; bytes++) {
        uint8_t *mask = malloc(bytes ? bytes : 1); /* exact: ASan sees over-reads */
        size_t expected = 0;
        for (size_t i = 0; i < bytes; i++) {
            mask[i] = (uint8_t)(i * 37 + bytes * 11);
            for (unsigned bit = 0; bit < 8; bit++)
                expected += mask[i] >> bit & 1u;
        }
        for (size_t v = 0; v < variant_count; v++)
            CHECK(variants[v]->count_bits(mask, bytes) == expected, "%s: %zu bytes",
                  variants[v]->name, bytes);
        free(mask);
    }
}

int main(void)
{
    find_variants();
    test_count_bits();
    test_pack();
    test_half_to_float();
    test_mask_above();
    test_histogram_low();
    return finish();
}
