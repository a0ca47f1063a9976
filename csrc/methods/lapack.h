/* The one place that knows how the linked BLAS and LAPACK spell their symbols: the scipy-openblas32
 * build, 32-bit integers, prefix scipy_. */
#ifndef FOLDPRUNE_LAPACK_H
#define FOLDPRUNE_LAPACK_H

#include <stddef.h>
#include <stdint.h>

#define fp_sgemm scipy_sgemm_
#define fp_strmm scipy_strmm_
#define fp_dgemm scipy_dgemm_
#define fp_dsymm scipy_dsymm_
#define fp_dsyrk scipy_dsyrk_
#define fp_dtrsm scipy_dtrsm_
#define fp_dpotrf scipy_dpotrf_
#define fp_dpotrs scipy_dpotrs_
#define fp_dgeqrf scipy_dgeqrf_
#define fp_dgeqp3 scipy_dgeqp3_
#define fp_dormqr scipy_dormqr_
#define fp_dgesdd scipy_dgesdd_
#define fp_dgelsd scipy_dgelsd_
#define fp_blas_set_threads scipy_openblas_set_num_threads
#define fp_blas_threads scipy_openblas_get_num_threads

void fp_sgemm(const char *transa, const char *transb, const int32_t *m, const int32_t *n,
              const int32_t *k, const float *alpha, const float *a, const int32_t *lda,
              const float *b, const int32_t *ldb, const float *beta, float *c, const int32_t *ldc,
              size_t, size_t);
void fp_strmm(const char *side, const char *uplo, const char *transa, const char *diag,
              const int32_t *m, const int32_t *n, const float *alpha, const float *a,
              const int32_t *lda, float *b, const int32_t *ldb, size_t, size_t, size_t, size_t);
void fp_dgemm(const char *transa, const char *transb, const int32_t *m, const int32_t *n,
              const int32_t *k, const double *alpha, const double *a, const int32_t *lda,
              const double *b, const int32_t *ldb, const double *beta, double *c,
              const int32_t *ldc, size_t, size_t);
void fp_dsyrk(const char *uplo, const char *trans, const int32_t *n, const int32_t *k,
              const double *alpha, const double *a, const int32_t *lda, const double *beta,
              double *c, const int32_t *ldc, size_t, size_t);
void fp_dtrsm(const char *side, const char *uplo, const char *transa, const char *diag,
              const int32_t *m, const int32_t *n, const double *alpha, const double *a,
              const int32_t *lda, double *b, const int32_t *ldb, size_t, size_t, size_t, size_t);
void fp_dsymm(const char *side, const char *uplo, const int32_t *m, const int32_t *n,
              const double *alpha, const double *a, const int32_t *lda, const double *b,
              const int32_t *ldb, const double *beta, double *c, const int32_t *ldc, size_t,
              size_t);
void fp_dpotrf(const char *uplo, const int32_t *n, double *a, const int32_t *lda, int32_t *info,
               size_t);
void fp_dpotrs(const char *uplo, const int32_t *n, const int32_t *nrhs, const double *a,
               const int32_t *lda, double *b, const int32_t *ldb, int32_t *info, size_t);
void fp_dgeqrf(const int32_t *m, const int32_t *n, double *a, const int32_t *lda, double *tau,
               double *work, const int32_t *lwork, int32_t *info);
void fp_dgeqp3(const int32_t *m, const int32_t *n, double *a, const int32_t *lda, int32_t *jpvt,
               double *tau, double *work, const int32_t *lwork, int32_t *info);
void fp_dormqr(const char *side, const char *trans, const int32_t *m, const int32_t *n,
               const int32_t *k, const double *a, const int32_t *lda, const double *tau, double *c,
               const int32_t *ldc, double *work, const int32_t *lwork, int32_t *info, size_t,
               size_t);
void fp_dgesdd(const char *jobz, const int32_t *m, const int32_t *n, double *a, const int32_t *lda,
               double *s, double *u, const int32_t *ldu, double *vt, const int32_t *ldvt,
               double *work, const int32_t *lwork, int32_t *iwork, int32_t *info, size_t);
void fp_dgelsd(const int32_t *m, const int32_t *n, const int32_t *nrhs, double *a,
               const int32_t *lda, double *b, const int32_t *ldb, double *s, const double *rcond,
               int32_t *rank, double *work, const int32_t *lwork, int32_t *iwork, int32_t *info);

/* Global to the library: the core runs one matrix per thread, so BLAS itself stays on one. */
void fp_blas_set_threads(int threads);
int fp_blas_threads(void);

#endif
