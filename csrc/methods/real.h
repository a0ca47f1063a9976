/* The precision that a file of templates is compiled for. */
#ifndef FOLDPRUNE_REAL_H
#define FOLDPRUNE_REAL_H

#include "lapack.h"

#if FP_REAL_DOUBLE
typedef double real;
#define FP_REAL(name) name##_f64
#define fp_gemm fp_dgemm
#else
typedef float real;
#define FP_REAL(name) name##_f32
#define fp_gemm fp_sgemm
#endif

/* c (m x n) = beta c + op(a) op(b), row-major; op is the transpose where the letter is 'T'. k is
 * the length of the sums. The sizes fit int32_t. */
static inline void multiply(char op_a, char op_b, size_t m, size_t n, size_t k, const real *a,
                            size_t a_row, const real *b, size_t b_row, real beta, real *c,
                            size_t c_row)
{
    const real one = 1;
    int32_t rows = (int32_t)n, cols = (int32_t)m, sums = (int32_t)k; /* BLAS sees transposes */
    int32_t lda = a_row ? (int32_t)a_row : 1, ldb = b_row ? (int32_t)b_row : 1;
    int32_t ldc = c_row ? (int32_t)c_row : 1;
    fp_gemm(&op_b, &op_a, &rows, &cols, &sums, &one, b, &ldb, a, &lda, &beta, c, &ldc, 1, 1);
}

#endif
