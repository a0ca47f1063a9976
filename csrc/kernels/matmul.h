/* The matmul family: products with tiles of a packed matrix (fp_packed in foldprune.h).
 *
 * A tile is up to FP_TILE rows of FP_TILE columns: one word of mask bits a row, and the kept values
 * row after row. Activations are transposed, feature by feature with
 * FP_TILE tokens each, so that one weight meets whole vectors of tokens; `width` of them are in
 * use, a multiple of FP_WIDTH_STEP. Sums run over columns (tokens for `gradient`) in ascending
 * order; variants differ in rounding, as those with registers make a tile's sum before they add it.
 */
#ifndef FOLDPRUNE_MATMUL_H
#define FOLDPRUNE_MATMUL_H

#include "kernels.h"

enum {
    FP_WIDTH_STEP = 16,
    FP_WIDTH_USUAL = 96,    /* whose sums fill twelve of AVX2's sixteen registers */
    FP_WIDTH_MAX = 128,     /* whose sums AVX-512 has registers for twice */
    FP_VECTOR_TOKENS = 4,   /* that `vector` takes at once */
    FP_VALUES_SLACK = 16,   /* values past its own that `vector` may read, but not use */
    FP_VALUES_AHEAD = 4096, /* bytes past its own that `vector` asks for, see fp_ask_ahead */
};

/* y[i][t] += sum_j w_ij x[j][t]; kept is how many values there are */
#define FP_FORWARD_SIGNATURE(real)                                                                 \
    (const uint64_t *mask, size_t rows, const real *values, size_t kept, const real *x,            \
     size_t width, real *y)
/* dx[j][t] += sum_i w_ij dy[i][t] */
#define FP_BACKWARD_SIGNATURE(real)                                                                \
    (const uint64_t *mask, size_t rows, const real *values, const real *dy, size_t width, real *dx)
/* dvalues[k] += sum_t dy[i][t] x[j][t], where the k-th kept value is at (i, j) */
#define FP_GRADIENT_SIGNATURE(real)                                                                \
    (const uint64_t *mask, size_t rows, const real *dy, const real *x, size_t width, real *dvalues)
/* Of `tiles` tiles side by side, all of one row of tiles: y[t * FP_TILE + i] = sum_j w_ij x_tj for
 * up to FP_VECTOR_TOKENS tokens. x_t begins at x + t * stride, FP_TILE numbers a tile. */
#define FP_VECTOR_SIGNATURE                                                                        \
    (const uint64_t *mask, size_t tiles, size_t rows, const void *values, const float *x,          \
     size_t stride, size_t tokens, float *y)

typedef struct fp_matmul_kernels {
    size_t width_max; /* that the three with `width` take */
    int expands;      /* whether `forward` expands values where much is kept */
    void(*forward) FP_FORWARD_SIGNATURE(float);
    void(*backward) FP_BACKWARD_SIGNATURE(float);
    void(*gradient) FP_GRADIENT_SIGNATURE(float);
    /* by the values' type */
    void(*vector_f32) FP_VECTOR_SIGNATURE;
    void(*vector_f16) FP_VECTOR_SIGNATURE;
    void(*vector_bf16) FP_VECTOR_SIGNATURE;
    void(*vector_i8) FP_VECTOR_SIGNATURE;
    /* y[j * y_stride + i] = x[i * x_stride + j], i < rows, j < cols */
    void (*transpose)(const float *x, size_t x_stride, size_t rows, size_t cols, float *y,
                      size_t y_stride);
} fp_matmul_kernels;

extern const fp_matmul_kernels fp_matmul_scalar;
extern const fp_matmul_kernels fp_matmul_avx2;
extern const fp_matmul_kernels fp_matmul_avx512;
extern const fp_matmul_kernels fp_matmul_avx512icl;
extern const fp_matmul_kernels fp_matmul_neon;

/* For float64, which is there to check the others' derivatives, the specification alone. */
void fp_forward_f64_scalar FP_FORWARD_SIGNATURE(double);
void fp_backward_f64_scalar FP_BACKWARD_SIGNATURE(double);
void fp_gradient_f64_scalar FP_GRADIENT_SIGNATURE(double);
void fp_transpose_f64_scalar(const double *x, size_t x_stride, size_t rows, size_t cols, double *y,
                             size_t y_stride);

/* How wide tiles of tokens are best with these kernels on this processor, a multiple of
 * FP_WIDTH_STEP. */
size_t fp_best_width(const fp_matmul_kernels *kernels);

/* Pieces that variants share. */

/* `vector` reads values once, one after the other. What comes some tiles later is asked for, into
 * the second cache: hardware prefetchers stop where a page ends. On Emerald Rapids one core reads
 * them twice as fast with it. */
static inline void fp_ask_ahead(const void *values)
{
    __builtin_prefetch((const void *)((uintptr_t)values + FP_VALUES_AHEAD), 0, 2);
}

void fp_transpose_scalar(const float *x, size_t x_stride, size_t rows, size_t cols, float *y,
                         size_t y_stride);
void fp_transpose_avx2(const float *x, size_t x_stride, size_t rows, size_t cols, float *y,
                       size_t y_stride);
void fp_vector_f32_scalar FP_VECTOR_SIGNATURE;
void fp_vector_f16_scalar FP_VECTOR_SIGNATURE;
void fp_vector_bf16_scalar FP_VECTOR_SIGNATURE;
void fp_vector_i8_scalar FP_VECTOR_SIGNATURE;

#endif
