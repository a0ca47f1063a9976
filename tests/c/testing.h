/* What tests of kernels share: checks, random bits, guarded buffers, the variants that run here. */
#ifndef FOLDPRUNE_TESTING_H
#define FOLDPRUNE_TESTING_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "matmul.h"

static unsigned long passed, failed;

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (condition) {                                                                           \
            passed++;                                                                              \
        } else if (failed++ < 20) {                                                                \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);                                 \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
        }                                                                                          \
    } while (0)

static uint64_t random_state = 88172645463325252u;

static inline uint32_t random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 16);
}

/* ---- buffers: unaligned, guarded or ending exactly where the heap block ends ---------- */

enum { GUARD = 64, GUARD_BYTE = 0xa5 };

typedef struct buffer {
    uint8_t *block, *data;
    size_t size, before, after;
} buffer;

/* `item` is the alignment that data keeps. Without a guard behind, the sanitizer is the guard. */
static buffer buffer_new(size_t size, size_t item, int guarded)
{
    buffer b = {
        .size = size, .before = GUARD + item * (random_bits() % 8), .after = guarded ? GUARD : 0};
    size_t total = b.before + size + b.after;
    b.block = malloc(total);
    if (!b.block)
        abort();
    memset(b.block, GUARD_BYTE, total);
    b.data = b.block + b.before;
    return b;
}

static inline buffer buffer_copy(const void *from, size_t size, size_t item)
{
    buffer b = buffer_new(size, item, 0);
    if (size)
        memcpy(b.data, from, size);
    return b;
}

static inline int intact(const buffer *b)
{
    size_t total = b->before + b->size + b->after;
    for (size_t i = 0; i < total; i++)
        if (b->block[i] != GUARD_BYTE && (i < b->before || i >= b->before + b->size))
            return 0;
    return 1;
}

static inline int same(const buffer *b, const void *expected)
{
    return !b->size || !memcmp(b->data, expected, b->size);
}

/* ---- the variants -------------------------------------------------------------------- */

static const fp_kernels *variants[8];
static size_t variant_count;

static inline void find_variants(void)
{
    const char *name;
    for (size_t i = 0; (name = fp_isa_name(i)) != NULL; i++) {
        const fp_kernels *kernels = fp_kernels_find(name);
#if defined(FP_TEST_EMULATED_AVX512)
        if (!strcmp(name, "avx512"))
            kernels = &fp_kernels_avx512;
        else if (!strcmp(name, "avx512icl"))
            kernels = &fp_kernels_avx512icl;
        else if (strcmp(name, "scalar"))
            continue;
#else
        if (!fp_isa_supported(i)) {
            printf("skipped: this processor does not run %s\n", name);
            continue;
        }
#endif
        CHECK(kernels != NULL, "%s runs here but is not in this build", name);
        if (kernels) {
            CHECK(!strcmp(fp_kernels_name(kernels), name), "%s is called %s", name,
                  fp_kernels_name(kernels));
            variants[variant_count++] = kernels;
            printf("testing %s\n", name);
        }
    }
}

/* Returns main's answer. */
static int finish(void)
{
    printf("%lu passed, %lu failed\n", passed, failed);
    return failed != 0;
}

#endif
