/* Chooses the kernel variant. This file is compiled for the baseline alone: it runs before anything
 * is known about the processor. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "matmul.h"

const fp_kernels fp_kernels_scalar = {
    .name = "scalar",
    .count_bits = fp_count_bits_scalar,
    .pack16 = fp_pack16_scalar,
    .pack32 = fp_pack32_scalar,
    .pack64 = fp_pack64_scalar,
    .unpack16 = fp_unpack16_scalar,
    .unpack32 = fp_unpack32_scalar,
    .unpack64 = fp_unpack64_scalar,
    .half_to_float = fp_half_to_float_scalar,
    .mask_above = fp_mask_above_scalar,
    .histogram_low = fp_histogram_low_scalar,
    .softmax = &fp_softmax_scalar,
    .matmul = &fp_matmul_scalar,
};

static int always(void)
{
    return 1;
}

static int never(void)
{
    return 0;
}

#if defined(__x86_64__)
static int has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

static int has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static int has_avx512icl(void)
{
    return has_avx512() && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vpopcntdq");
}
#define FP_AVX2 &fp_kernels_avx2, has_avx2
#define FP_AVX512 &fp_kernels_avx512, has_avx512
#define FP_AVX512ICL &fp_kernels_avx512icl, has_avx512icl
#else
#define FP_AVX2 NULL, never
#define FP_AVX512 NULL, never
#define FP_AVX512ICL NULL, never
#endif

#if defined(__aarch64__)
#define FP_NEON &fp_kernels_neon, always
#else
#define FP_NEON NULL, never
#endif

/* From the plainest to the best; the last one that runs is the default. */
static const struct {
    const char *name;
    const fp_kernels *kernels;
    int (*supported)(void);
} variants[] = {
    {"scalar", &fp_kernels_scalar, always},
    {"neon", FP_NEON},
    {"avx2", FP_AVX2},
    {"avx512", FP_AVX512},
    {"avx512icl", FP_AVX512ICL},
};
enum { VARIANTS = sizeof variants / sizeof variants[0] };

const char *fp_isa_name(size_t index)
{
    return index < VARIANTS ? variants[index].name : NULL;
}

int fp_isa_compiled(size_t index)
{
    return index < VARIANTS && variants[index].kernels != NULL;
}

int fp_isa_supported(size_t index)
{
    return index < VARIANTS && variants[index].supported();
}

const char *fp_kernels_name(const fp_kernels *kernels)
{
    return kernels->name;
}

const fp_kernels *fp_kernels_find(const char *isa)
{
    for (size_t i = 0; i < VARIANTS; i++)
        if (!strcmp(variants[i].name, isa) && variants[i].kernels && variants[i].supported())
            return variants[i].kernels;
    return NULL;
}

const fp_kernels *fp_kernels_default(void)
{
    const char *forced = getenv("FOLDPRUNE_ISA");
    if (forced && *forced)
        return fp_kernels_find(forced);
    const fp_kernels *best = NULL;
    for (size_t i = 0; i < VARIANTS; i++)
        if (variants[i].kernels && variants[i].supported())
            best = variants[i].kernels;
    return best;
}

/* Of one core, in bytes, or less than 1 where the system does not say. It is asked once: some ask
 * the processor, which in a virtual machine takes long. */
static long first_cache(void)
{
    static _Atomic long bytes;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    if (!bytes) {
        long found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
        bytes = found ? found : -1;
    }
#endif
    return bytes;
}

/* A tile of activations has to leave a quarter of the first cache to weights and sums. */
size_t fp_best_width(const fp_matmul_kernels *kernels)
{
    long room = first_cache() / 4 * 3;
    size_t width = FP_WIDTH_USUAL;
    while (width < kernels->width_max &&
           (long)((width + FP_WIDTH_STEP) * FP_TILE * sizeof(float)) <= room)
        width += FP_WIDTH_STEP;
    return width;
}
