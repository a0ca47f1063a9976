/* Products with matrices of which much is kept, in float32: BLAS, a block of tiles at a time, which
 * is unpacked for it or, of the gradient, packed after it. No more than a block is ever dense. */
#ifndef FOLDPRUNE_MATMUL_DENSE_H
#define FOLDPRUNE_MATMUL_DENSE_H

#include "foldprune.h"

/* Whether BLAS can count so far. */
int fp_dense_fits(const fp_packed *p, size_t tokens);

size_t fp_dense_work(int threads); /* bytes, for any of these */

/* As the products in foldprune.h; everything has been checked. */
void fp_dense_forward(const fp_kernels *kernels, const fp_packed *p, const float *x, size_t tokens,
                      const float *bias, float *y, int threads, void *work);
void fp_dense_backward(const fp_kernels *kernels, const fp_packed *p, const float *dy,
                       size_t tokens, float *dx, int threads, void *work);
void fp_dense_gradient(const fp_kernels *kernels, const fp_packed *p, const float *dy,
                       const float *x, size_t tokens, float *dvalues, int threads, void *work);

#endif
