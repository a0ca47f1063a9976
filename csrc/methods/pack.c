/* Packing: chunks of the mask go to threads, each at the offset that the bits before it give. */
#include "kernels.h"
#include "parallel.h"

enum { LEAST_CHUNK = 1 << 16 }; /* elements */

size_t fp_mask_bytes(size_t n)
{
    return n / 8 + (n % 8 != 0);
}

typedef struct pack_call {
    const fp_kernels *kernels;
    const fp_pack_plan *plan;
    const uint8_t *mask;
    char *x, *values; /* whichever is the input is never written */
    size_t item_size;
    int unpack;
    size_t *counts;
} pack_call;

static size_t chunk_size(const fp_pack_plan *plan, size_t item)
{
    size_t begin = item * plan->chunk;
    return plan->n - begin < plan->chunk ? plan->n - begin : plan->chunk;
}

static void count_chunk(void *context, size_t item, int worker)
{
    pack_call *c = context;
    (void)worker;
    c->counts[item] = c->kernels->count_bits(c->mask + item * c->plan->chunk / 8,
                                             fp_mask_bytes(chunk_size(c->plan, item)));
}

fp_status fp_pack_prepare(const fp_kernels *kernels, const uint8_t *mask, size_t n,
                          fp_pack_plan *plan, int threads)
{
    if (!kernels || !plan || (n && !mask))
        return FP_ERR_ARGUMENT;
    if (n % 8 && mask[n / 8] >> (n % 8))
        return FP_ERR_CORRUPT;
    size_t least = n / FP_PACK_CHUNKS + 1;
    plan->n = n;
    plan->chunk = (least + LEAST_CHUNK - 1) / LEAST_CHUNK * LEAST_CHUNK; /* whole mask bytes */
    plan->chunks = n / plan->chunk + (n % plan->chunk != 0);
    plan->offset[0] = 0;
    pack_call c = {.kernels = kernels, .plan = plan, .mask = mask, .counts = plan->offset + 1};
    fp_parallel_for(plan->chunks, threads, count_chunk, &c);
    for (size_t i = 0; i < plan->chunks; i++)
        plan->offset[i + 1] += plan->offset[i];
    plan->kept = plan->offset[plan->chunks];
    return FP_OK;
}

static void move_chunk(void *context, size_t item, int worker)
{
    pack_call *c = context;
    const fp_pack_plan *plan = c->plan;
    size_t begin = item * plan->chunk, n = chunk_size(plan, item);
    size_t kept = plan->offset[item + 1] - plan->offset[item];
    const uint8_t *mask = c->mask + begin / 8;
    void *x = c->x + begin * c->item_size;
    void *values = c->values + plan->offset[item] * c->item_size;
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

static fp_status run(pack_call *c, int threads)
{
    if (!c->kernels || !c->plan || (c->plan->n && (!c->mask || !c->x)) ||
        (c->plan->kept && !c->values))
        return FP_ERR_ARGUMENT;
    if (c->item_size != 2 && c->item_size != 4 && c->item_size != 8)
        return FP_ERR_DTYPE;
    fp_parallel_for(c->plan->chunks, threads, move_chunk, c);
    return FP_OK;
}

fp_status fp_pack(const fp_kernels *kernels, const fp_pack_plan *plan, const uint8_t *mask,
                  const void *x, size_t item_size, void *values, int threads)
{
    pack_call c = {.kernels = kernels,
                   .plan = plan,
                   .mask = mask,
                   .x = (char *)(uintptr_t)x,
                   .values = values,
                   .item_size = item_size};
    return run(&c, threads);
}

fp_status fp_unpack(const fp_kernels *kernels, const fp_pack_plan *plan, const uint8_t *mask,
                    const void *values, size_t item_size, void *x, int threads)
{
    pack_call c = {.kernels = kernels,
                   .plan = plan,
                   .mask = mask,
                   .x = x,
                   .values = (char *)(uintptr_t)values,
                   .item_size = item_size,
                   .unpack = 1};
    return run(&c, threads);
}
