/* Packing: chunks of the mask go to threads, each at the offset that the bits before it give. */
#include <string.h>

#include "kernels.h"
#include "parallel.h"

enum { CHUNK = 1 << 16, MAX_CHUNKS = 256 }; /* elements of a small chunk; chunks of one call */

size_t fp_mask_bytes(size_t n)
{
    return n / 8 + (n % 8 != 0);
}

/* Set bits of whole bytes. */
static size_t count_bits(const uint8_t *mask, size_t bytes)
{
    size_t total = 0, i = 0;
    for (; i + 8 <= bytes; i += 8) {
        uint64_t word;
        memcpy(&word, mask + i, 8);
        /* the compiler's builtin becomes a table call on a baseline build: SWAR is faster */
        word = word - ((word >> 1) & 0x5555555555555555u);
        word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
        word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
        total += (size_t)((word * 0x0101010101010101u) >> 56);
    }
    for (; i < bytes; i++)
        for (unsigned byte = mask[i]; byte; byte &= byte - 1)
            total++;
    return total;
}

fp_status fp_mask_count(const uint8_t *mask, size_t n, size_t *kept)
{
    if (n && !mask)
        return FP_ERR_ARGUMENT;
    if (n % 8 && mask[n / 8] >> (n % 8))
        return FP_ERR_CORRUPT;
    *kept = count_bits(mask, fp_mask_bytes(n));
    return FP_OK;
}

typedef struct pack_call {
    const fp_kernels *kernels;
    const uint8_t *mask;
    char *x, *values; /* whichever is the input is never written */
    size_t item_size, n, chunk;
    size_t offset[MAX_CHUNKS + 1];
    int unpack;
} pack_call;

static void count_chunk(void *context, size_t item, int worker)
{
    pack_call *c = context;
    size_t begin = item * c->chunk, end = begin + c->chunk < c->n ? begin + c->chunk : c->n;
    (void)worker;
    c->offset[item + 1] = count_bits(c->mask + begin / 8, fp_mask_bytes(end - begin));
}

static void move_chunk(void *context, size_t item, int worker)
{
    pack_call *c = context;
    size_t begin = item * c->chunk, n = begin + c->chunk < c->n ? c->chunk : c->n - begin;
    size_t kept = c->offset[item + 1] - c->offset[item];
    const uint8_t *mask = c->mask + begin / 8;
    void *x = c->x + begin * c->item_size, *values = c->values + c->offset[item] * c->item_size;
    (void)worker;
    switch (c->item_size) {
    case 2:
        if (c->unpack)
            c->kernels->unpack16(values, kept, mask, n, x);
        else
            c->kernels->pack16(x, mask, n, values, kept);
        break;
    case 4:
        if (c->unpack)
            c->kernels->unpack32(values, kept, mask, n, x);
        else
            c->kernels->pack32(x, mask, n, values, kept);
        break;
    default:
        if (c->unpack)
            c->kernels->unpack64(values, kept, mask, n, x);
        else
            c->kernels->pack64(x, mask, n, values, kept);
    }
}

static fp_status run(pack_call *c, size_t kept, int threads)
{
    if (!c->n)
        return kept ? FP_ERR_CORRUPT : FP_OK;
    if (!c->kernels || !c->mask || !c->x || (kept && !c->values))
        return FP_ERR_ARGUMENT;
    if (c->item_size != 2 && c->item_size != 4 && c->item_size != 8)
        return FP_ERR_DTYPE;
    if (c->n % 8 && c->mask[c->n / 8] >> (c->n % 8))
        return FP_ERR_CORRUPT;

    size_t least = c->n / MAX_CHUNKS + 1;
    c->chunk =
        (least + CHUNK - 1) / CHUNK * CHUNK; /* a multiple of 8: chunks start at whole bytes */
    size_t chunks = (c->n + c->chunk - 1) / c->chunk;
    fp_parallel_for(chunks, threads, count_chunk, c);
    c->offset[0] = 0;
    for (size_t i = 0; i < chunks; i++)
        c->offset[i + 1] += c->offset[i];
    if (c->offset[chunks] != kept)
        return FP_ERR_CORRUPT;
    fp_parallel_for(chunks, threads, move_chunk, c);
    return FP_OK;
}

fp_status fp_pack(const fp_kernels *kernels, const void *x, size_t item_size, size_t n,
                  const uint8_t *mask, void *values, size_t kept, int threads)
{
    pack_call c = {.kernels = kernels,
                   .mask = mask,
                   .x = (char *)(uintptr_t)x,
                   .values = values,
                   .item_size = item_size,
                   .n = n};
    return run(&c, kept, threads);
}

fp_status fp_unpack(const fp_kernels *kernels, const void *values, size_t kept, size_t item_size,
                    const uint8_t *mask, size_t n, void *x, int threads)
{
    pack_call c = {.kernels = kernels,
                   .mask = mask,
                   .x = x,
                   .values = (char *)(uintptr_t)values,
                   .item_size = item_size,
                   .n = n,
                   .unpack = 1};
    return run(&c, kept, threads);
}
