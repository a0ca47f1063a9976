/* Products with tiles on AVX-512. */
#include "matmul.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "target.h"

FP_TARGET_BEGIN(FP_AVX512_FEATURES)

#include "matmul_avx512.h"
#include "matmul_loop.h"
#include "matmul_vector.h"

FP_DEFINE_MATMUL(avx512);

FP_TARGET_END
#endif
