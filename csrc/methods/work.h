/* Pieces of a caller's workspace. */
#ifndef FOLDPRUNE_WORK_H
#define FOLDPRUNE_WORK_H

#include <stddef.h>

/* Gives out pieces of a buffer, or with base NULL only adds up their sizes. */
static inline void *fp_take(char *base, size_t *used, size_t items, size_t size)
{
    void *piece = base ? base + *used : NULL;
    *used += (items * size + 63) / 64 * 64;
    return piece;
}

#endif
