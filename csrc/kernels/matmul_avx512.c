/* Products with tiles on AVX-512: values spread by vpexpand. */
#include "matmul.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "target.h"

FP_TARGET_BEGIN(FP_AVX512_FEATURES)

/* Between registers: from memory the instruction is slow on Zen 4. */
static inline __m512 spread(__m512 v, const uint8_t *mask, int part)
{
    uint16_t bits;
    memcpy(&bits, mask + 2 * part, sizeof bits);
    return _mm512_maskz_expand_ps(bits, v);
}

#include "matmul_avx512.h"
#include "matmul_loop.h"
#include "matmul_vector.h"

FP_DEFINE_MATMUL(avx512);

FP_TARGET_END
#endif
