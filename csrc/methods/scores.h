/* Scores of a matrix's elements, read in pieces. Shared by selection and masks. */
#ifndef FOLDPRUNE_SCORES_H
#define FOLDPRUNE_SCORES_H

#include "kernels.h"

/* PIECE elements are scored at a time, into a buffer that stays in the first-level cache; CHUNK is
 * what one thread takes at a time, a multiple of PIECE and of the 8 elements of a mask byte. */
enum { FP_PIECE = 4096, FP_CHUNK = 1 << 16 };

/* Checks pointers, dtype, scale and sizes. */
fp_status fp_scored_check(const fp_scored *t);

/* Number of elements; fp_scored_check has seen that it fits. */
static inline size_t fp_scored_size(const fp_scored *t)
{
    return t->rows * t->cols;
}

static inline size_t fp_chunks(size_t n)
{
    return n / FP_CHUNK + (n % FP_CHUNK != 0);
}

void fp_bfloat_to_float(const uint16_t *x, size_t n, float *y);

/* float32 scores of elements [begin, begin + n), n <= FP_PIECE. Returns buffer, or the matrix
 * itself where the scores can be read in place: then the sign bit is to be ignored. */
const float *fp_scores_load(const fp_kernels *kernels, const fp_scored *t, size_t begin, size_t n,
                            float *buffer);

/* The same scores as float64; for FP_F64 computed in float64. */
void fp_scores_load_double(const fp_scored *t, size_t begin, size_t n, double *buffer);

/* The k-th smallest (from 0) of x[0 .. n), which is reordered. Pivots are drawn from a fixed
 * sequence: linear expected time for any order of the input, and the same work every time. */
double fp_kth_smallest(double *x, size_t n, size_t k);

#endif
