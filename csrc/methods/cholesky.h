/* Cholesky factors of one large matrix, by tiles that go to threads. */
#ifndef FOLDPRUNE_CHOLESKY_H
#define FOLDPRUNE_CHOLESKY_H

#include "foldprune.h"

/* The lower triangle of a (n x n, column-major) becomes L with a = L L^T; what stands above the
 * diagonal is left alone. FP_ERR_LAPACK if a is not positive definite or not finite. */
fp_status fp_cholesky(double *a, size_t n, int threads);

/* inverse (n x n, all of it, symmetric) = (L L^T)^-1. */
void fp_cholesky_inverse(const double *l, size_t n, double *inverse, int threads);

#endif
