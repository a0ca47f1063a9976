/* Sets the instruction set inside a variant's file:
 *
 *     FP_TARGET_BEGIN(FP_AVX2_FEATURES)   after the #includes
 *     ...
 *     FP_TARGET_END
 *
 * No -march flag is ever passed: it would also reach inline functions of system headers, whose
 * copies the linker may then pick for baseline code. */
#ifndef FOLDPRUNE_TARGET_H
#define FOLDPRUNE_TARGET_H

#define FP_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define FP_TARGET_BEGIN(features)                                                                  \
    FP_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FP_TARGET_END FP_PRAGMA(clang attribute pop)
#define FP_UNROLL FP_PRAGMA(unroll)
#else
#define FP_TARGET_BEGIN(features) FP_PRAGMA(GCC push_options) FP_PRAGMA(GCC target(features))
#define FP_TARGET_END FP_PRAGMA(GCC pop_options)
#define FP_UNROLL FP_PRAGMA(GCC unroll 32)
#endif
#define INLINE static inline __attribute__((always_inline))

/* FP_IN_REGISTER: for a vector that several instructions read, which compilers else have each of
 * them load. FP_ADDRESS: for an address that several instructions read at, for which they else give
 * each of them base and index, which Intel's processors then issue as two; or for any integer that
 * is not to be a vector's yet. */
#if defined(__x86_64__)
#define FP_IN_REGISTER(v) __asm__("" : "+v"(v))
#define FP_ADDRESS(p) __asm__("" : "+r"(p))
#else
#define FP_IN_REGISTER(v) (void)(v)
#define FP_ADDRESS(p) (void)(p)
#endif

/* What cpu.c checks before it chooses the variant, and nothing more. */
#define FP_AVX2_FEATURES "avx2,fma,f16c,bmi,bmi2,popcnt"
#define FP_AVX512_FEATURES "avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq"
/* What Ice Lake brought, and Zen 4 has too. */
#define FP_AVX512ICL_FEATURES                                                                      \
    "avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vpopcntdq"

#endif
