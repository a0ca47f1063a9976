/* What tests of whole methods share: checks, numbers in (-1, 1), blocks of an exact size. */
#ifndef FOLDPRUNE_METHODS_TESTING_H
#define FOLDPRUNE_METHODS_TESTING_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int passed, failed;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (condition) {                                                                           \
            passed++;                                                                              \
        } else {                                                                                   \
            failed++;                                                                              \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
        }                                                                                          \
    } while (0)

static uint64_t state = 88172645463325252u;

static double uniform(void) /* in (-1, 1) */
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (double)(state >> 11) / 4503599627370496.0 - 1.0;
}

static void *exactly(size_t bytes)
{
    void *p = malloc(bytes ? bytes : 1);
    if (!p)
        abort();
    memset(p, 0x5a, bytes);
    return p;
}

/* Returns main's answer. */
static int finish(void)
{
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}

#endif
