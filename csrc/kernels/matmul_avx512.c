/* Products with tiles on AVX-512: values spread by vpexpand. */
#include "matmul.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "target.h"

FP_TARGET_BEGIN(FP_AVX512_FEATURES)

enum { FEW_CHAINS = 2, SPREADS_BOTH = 0 };

/* Between registers: from memory the instruction is slow on Zen 4. */
static inline __m512 spread(__m512 v, uint32_t bits, int part)
{
    (void)part;
    return _mm512_maskz_expand_ps((__mmask16)bits, v);
}

#include "matmul_avx512.h"

FP_DEFINE_MATMUL(avx512);

FP_TARGET_END
#endif
