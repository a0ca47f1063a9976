/* foldprune's C core: pruning and folding of weight matrices on raw buffers.
 *
 * Plain C11. Nothing here allocates memory or knows Python: where a function
 * needs workspace, its _plan twin says how many bytes and the caller gives them.
 * Every function that can fail returns an fp_status and validates its arguments
 * before it writes anything. Results are the same bytes for any thread count.
 */
#ifndef FOLDPRUNE_H
#define FOLDPRUNE_H

#include <stddef.h>
#include <stdint.h>

typedef enum fp_status {
    FP_OK = 0,
    FP_ERR_ARGUMENT, /* a null pointer, a zero size or a flag nobody knows */
    FP_ERR_DTYPE,    /* an element type that the function does not take */
    FP_ERR_SHAPE,    /* sizes that disagree with each other */
    FP_ERR_RANGE,    /* a rank, count or index outside its range */
    FP_ERR_CORRUPT,  /* packed data that contradicts its mask or sizes */
    FP_ERR_LAPACK,   /* LAPACK did not converge or refused its input */
    FP_ERR_OVERFLOW, /* a size that does not fit size_t or LAPACK's int */
    FP_ERR_VALUE     /* a number that is NaN, infinite, too large, or a negative weight */
} fp_status;

/* A sentence for people; never NULL. */
const char *fp_status_text(fp_status status);

/* FP_I8 only as values of an fp_packed. */
typedef enum fp_dtype { FP_F32 = 0, FP_F64, FP_F16, FP_BF16, FP_I8 } fp_dtype;

size_t fp_dtype_size(fp_dtype dtype); /* bytes per element; 0 for another one, FP_I8 among them */

/* ---- kernel variants (kernels/cpu.c) ------------------------------------------------ */

typedef struct fp_kernels fp_kernels;

/* The variant in use: the best one this processor runs, or the one that the environment
 * variable FOLDPRUNE_ISA names ("scalar", "avx2", "avx512", "avx512icl", "neon"). NULL if
 * that one cannot be used here. */
const fp_kernels *fp_kernels_default(void);

/* Variant by name, or NULL if it is not compiled in or the processor lacks it. */
const fp_kernels *fp_kernels_find(const char *isa);

/* Names: compiled into this build, and whether the processor could run each known one.
 * Both walk the known variants by index and return NULL / 0 past the end. */
const char *fp_isa_name(size_t index);
int fp_isa_compiled(size_t index);
int fp_isa_supported(size_t index);
const char *fp_kernels_name(const fp_kernels *kernels);

/* ---- packing (methods/pack.c) ------------------------------------------------------- *
 * A mask is a bit string over the elements in row-major order, least significant bit first,
 * (n + 7) / 8 bytes, unused bits of the last byte zero. A set bit means "kept". */

size_t fp_mask_bytes(size_t n);

/* Where the kept elements of every chunk of a mask go: chunks are packed on their own. */
enum { FP_PACK_CHUNKS = 256 };
typedef struct fp_pack_plan {
    size_t n, kept; /* elements, and how many are kept */
    size_t chunk, chunks;
    size_t offset[FP_PACK_CHUNKS + 1];
} fp_pack_plan;

/* Counts the mask's bits. FP_ERR_CORRUPT if an unused bit is set. */
fp_status fp_pack_prepare(const fp_kernels *kernels, const uint8_t *mask, size_t n,
                          fp_pack_plan *plan, int threads);

/* values[0 .. kept) = the kept elements of x (n elements of item_size 2, 4 or 8 bytes) in order.
 * The plan is that of the same mask. */
fp_status fp_pack(const fp_kernels *kernels, const fp_pack_plan *plan, const uint8_t *mask,
                  const void *x, size_t item_size, void *values, int threads);

/* The inverse: x[i] = next value where the bit is set, 0 elsewhere. */
fp_status fp_unpack(const fp_kernels *kernels, const fp_pack_plan *plan, const uint8_t *mask,
                    const void *values, size_t item_size, void *x, int threads);

/* ---- forward propagation pruning: scores, selection, masks (methods/fpp.c, select.c) - */

/* A matrix whose elements compete to be kept. The score of x[i][j] is
 * |x[i][j]| * scale * (col_scale ? col_scale[j] : 1), in float32 (float64 for FP_F64).
 * Row-major, contiguous, aligned to its element. */
typedef struct fp_scored {
    const void *x;
    fp_dtype dtype;
    size_t rows, cols;
    double scale;
    const float *col_scale; /* NULL, or cols non-negative numbers */
} fp_scored;

/* 1 if no element is NaN or infinite. */
int fp_all_finite(const void *x, fp_dtype dtype, size_t n, int threads);

/* Sum of squares of the elements times col_scale, in float64. Same bits for any thread count. */
double fp_energy(const fp_scored *t, int threads);

/* Number of elements by the upper 16 bits of their float32 score (sign bit excluded, so 15
 * exponent-and-mantissa bits: bin = bits >> 16). Histograms of several matrices add up. */
enum { FP_HISTOGRAM_BINS = 1 << 15 };
size_t fp_select_work(int threads); /* bytes, for histograms and selection alike */
fp_status fp_histogram(const fp_kernels *kernels, const fp_scored *t, size_t count,
                       uint64_t histogram[FP_HISTOGRAM_BINS], int threads, void *work,
                       size_t work_bytes);

/* The score such that removing every smaller one, and the first `ties` that equal it (in order of
 * matrix and index), removes exactly k of all elements. Exact, by selection on the bits of
 * the score; never sorts. k from 0 to the number of elements. */
typedef struct fp_threshold {
    double score;
    uint64_t ties;
} fp_threshold;
fp_status fp_select(const fp_kernels *kernels, const fp_scored *t, size_t count, uint64_t k,
                    fp_threshold *out, int threads, void *work, size_t work_bytes);

/* Mask of one matrix under a threshold. `ties` is how many elements equal to it may still be
 * removed; *ties_used how many were. */
size_t fp_mask_work(const fp_scored *t);
fp_status fp_mask_threshold(const fp_kernels *kernels, const fp_scored *t, fp_threshold threshold,
                            uint8_t *mask, uint64_t *ties_used, int threads, void *work,
                            size_t work_bytes);

/* Mask that removes the k lowest scores of every row (ties: the first). */
size_t fp_mask_rows_work(const fp_scored *t, int threads);
fp_status fp_mask_rows(const fp_scored *t, size_t k, uint8_t *mask, int threads, void *work,
                       size_t work_bytes);

/* Mask that keeps the n highest scores of every m consecutive columns (ties: the first kept); a
 * last group of fewer than m keeps at most n. 1 <= n <= m <= 64. */
fp_status fp_mask_nm(const fp_scored *t, unsigned n, unsigned m, uint8_t *mask, int threads);

/* Root mean square score of every block_rows x block_cols block, grid in row-major order; blocks at
 * the right and lower edge may be smaller. */
fp_status fp_block_scores(const fp_scored *t, size_t block_rows, size_t block_cols, float *scores,
                          int threads);

/* Mask of elements from a mask over such a grid of blocks. */
fp_status fp_mask_blocks(const uint8_t *block_mask, size_t rows, size_t cols, size_t block_rows,
                         size_t block_cols, uint8_t *mask, int threads);

/* ---- folding: products seen only as M = left^T right (methods/fold.c, irc.c, dwc.c) -- */

/* A view of a logical matrix; strides in bytes, of any sign, so fused, interleaved and
 * transposed tensors need no copy. */
typedef struct fp_matrix {
    const void *data;
    fp_dtype dtype;
    size_t rows, cols;
    ptrdiff_t row_stride, col_stride;
} fp_matrix;

/* The heads of one attention block. Head i of `heads` owns rows i*head_dim .. of `left`; `right`
 * has groups such blocks of rows, each shared by heads / groups consecutive heads (grouped-query
 * attention). IRC: left = [W_q b_q], right = W_k. DWC: left = W_o transposed, right = W_v.
 * left_bias (heads * head_dim numbers, or data NULL) is one more column of left; right_extra one
 * more column of right, carried along but never chosen as a pivot. */
typedef struct fp_heads {
    fp_matrix left, right;
    fp_matrix left_bias, right_extra; /* (n x 1) views, data NULL if absent */
    size_t heads, groups, head_dim;
    /* Root mean square of what each column meets, positive, or NULL for 1: errors, pivots and
     * planes are judged in these units. One number per column of left and of right, without the
     * bias and extra columns, which meet 1. */
    const double *left_scale, *right_scale;
    /* Instead of a side's scales, all that is known of what its columns meet: a square row-major
     * F, F F^T their second moment, no row of zeros; NULL if not known. left_factor counts the bias
     * column too, as the last one; right_factor leaves the extra column out. Errors are then
     * ||F_left^T (M - M') F_right||^2. */
    const double *left_factor, *right_factor;
} fp_heads;

/* What a fold writes, all float64, row-major. n = left.cols + bias, d = right.cols, e = extra.
 * Where a group's rank is below its capacity, the rows past it are zero and its pivots -1. */
typedef struct fp_fold_out {
    double *left;    /* heads x capacity x n */
    double *right;   /* groups x capacity x (d + e) */
    int32_t *pivots; /* groups x capacity: pivots of the identity, or NULL for no gauge */
    int32_t *ranks;  /* groups */
    double *error;   /* groups: squared error of M, weighted as fp_heads says */
    double *energy;  /* groups: squared norm of M, likewise */
    size_t capacity; /* rows per head that left, right and pivots have room for */
} fp_fold_out;

size_t fp_fold_work(const fp_heads *h, int threads);

/* Squared singular values of each group's weighted M in descending order: groups x head_dim. */
fp_status fp_irc_spectrum(const fp_heads *h, double *squared, int threads, void *work,
                          size_t work_bytes);

/* IRC: rank-r factors of M per group (ranks[j] <= head_dim; ranks NULL means all of M, by its
 * numerical rank), of least weighted error. With out->pivots the right factor holds the identity in
 * `rank` of its columns, chosen by column-pivoted QR, so that rank^2 numbers need no storing;
 * without, the factors are balanced (equal singular values, each as its own side weighs it). */
fp_status fp_irc_apply(const fp_heads *h, const int32_t *ranks, fp_fold_out *out, int threads,
                       void *work, size_t work_bytes);

/* DWC with given columns (groups x capacity) or, with columns NULL, chosen: right = identity in the
 * columns S (extra: least squares), left = (M[:, S] + what S tells of M's other columns)^T, which
 * without a right_factor is nothing. Chosen are the columns of M of largest norm; with a
 * right_factor one after the other, each the one that lowers the error most, fewer than capacity
 * where the rest add nothing. Always in ascending order. */
fp_status fp_dwc_select(const fp_heads *h, const int32_t *columns, fp_fold_out *out, int threads,
                        void *work, size_t work_bytes);

/* DWC with the identity in pivot columns of right and in the other ones a remainder of rank k per
 * group (remainder_ranks NULL: kept whole, as fp_irc_apply without ranks). The remainder's factors
 * are a (groups x capacity x head_dim, first k columns used) and b (groups x head_dim x d, first k
 * rows used, zero at pivots); out->right has the identity and the extra column alone. Remainder and
 * out->left are those of least weighted error together. */
fp_status fp_dwc_remainder(const fp_heads *h, const int32_t *remainder_ranks, fp_fold_out *out,
                           double *a, double *b, int threads, void *work, size_t work_bytes);

/* What each rank of the remainder takes off fp_dwc_remainder's error: groups x head_dim, in
 * descending order. */
fp_status fp_dwc_spectrum(const fp_heads *h, double *squared, double *energy, int threads,
                          void *work, size_t work_bytes);

/* ---- rotary position embedding: folds that commute with the rotation (methods/rope.c) */

typedef enum fp_rope { FP_ROPE_HALF = 0, FP_ROPE_ADJACENT = 1 } fp_rope;

/* Expected contribution |q_p|^2 |k_p|^2 of every plane p to the logits: groups x head_dim / 2. Both
 * bias columns count (left_bias, right_extra): under rotation neither drops out. Factors are not
 * taken: fp_rope_apply keeps planes by any scores. */
fp_status fp_rope_scores(const fp_heads *h, fp_rope pairing, double *scores, int threads);

/* Keep the ranks[j] planes of group j of largest score (fp_rope_scores' answer; ranks NULL: every
 * plane that contributes), stored in ascending order. left: heads x capacity x 2 x n, right: groups
 * x capacity x 2 x (d + e), planes and out->pivots: groups x capacity, -1 past the rank. With
 * out->pivots each kept plane is rotated and scaled so that its pivot column is (1, 0): two numbers
 * that need no storing. */
fp_status fp_rope_apply(const fp_heads *h, fp_rope pairing, const double *scores,
                        const int32_t *ranks, int32_t *planes, fp_fold_out *out, int threads);

/* ---- calibration: sums over rows of activations (methods/moments.c) ------------------ *
 * x has a row per token. Weights (NULL: 1 each) are finite and not negative; a row of weight 0 is
 * padding, is never read and may hold anything. All other values must be finite, and |x|
 * sqrt(weight) at most 1e150, so that squares fit. Everything is checked before anything is added:
 * a failed call leaves the sums as they were. */

typedef struct fp_row_total {
    double weight; /* sum of the weights */
    uint64_t rows; /* rows of weight above 0 */
} fp_row_total;

/* FP_ERR_VALUE if a row or its weight is not as above; *bad is the first such row, x->rows if there
 * is none. */
fp_status fp_rows_check(const fp_matrix *x, const double *weights, size_t *bad, int threads);

/* second (cols x cols) += sum of weight x x^T, sum (cols) += sum of weight x. Only the lower
 * triangle of `second` is read; the upper one is written as its mirror. Work: 0 bytes means too
 * many columns. */
size_t fp_moments_work(const fp_matrix *x);
fp_status fp_moments_update(const fp_matrix *x, const double *weights, double *second, double *sum,
                            fp_row_total *total, int threads, void *work, size_t work_bytes);

/* squares (cols) += sum of weight x^2, by element. */
fp_status fp_square_sums(const fp_matrix *x, const double *weights, double *squares,
                         fp_row_total *total, int threads);

/* counts[ids[i]] += weights[i] for all n ids; *weight is their sum. FP_ERR_RANGE if an id of weight
 * above 0 is not in [0, rows). */
fp_status fp_count_rows(const int64_t *ids, size_t n, const double *weights, double *counts,
                        size_t rows, double *weight);

/* ---- FPP with update (methods/obs_factor.c, obs.c, refit.c, damage.c) ------ *
 * A matrix W (rows x cols) is judged by the second moment of its inputs: replacing a row w by w'
 * costs (w' - w) H (w' - w)^T, H = C + damping I, symmetric, float64, row-major. */

/* H = (I + A) D (I + A)^T with A strictly upper triangular and D diagonal: the Cholesky factor of
 * the inverse in another guise, without an inverse. With columns fixed from left to right to values
 * w^, what is left to choose at column j is best at w'_j = w_j + sum_{k < j} (w_k - w^_k) A_kj, and
 * moving it from there by e costs D_j e^2. a: cols x cols, row-major, all of it written; d: cols.
 * FP_ERR_LAPACK if H is not positive definite. */
size_t fp_obs_factor_work(size_t cols);
fp_status fp_obs_factor(const double *h, size_t cols, float *a, double *d, int threads, void *work,
                        size_t work_bytes);

/* Which weights the sweep removes; the price of one is row_weight_i * D_j * w'_ij^2. */
typedef enum fp_obs_rule {
    FP_OBS_BLOCK,     /* the cheapest of each block of columns, all rows competing */
    FP_OBS_ROW,       /* the cheapest of each block of columns in every row */
    FP_OBS_THRESHOLD, /* those cheaper than a threshold */
    FP_OBS_NM,        /* all but the n dearest of every m consecutive columns */
    FP_OBS_GIVEN      /* those whose bit in the mask is clear */
} fp_obs_rule;

typedef struct fp_obs_options {
    fp_obs_rule rule;
    /* BLOCK: how many weights of the matrix are removed; ROW: of each row. Every block of columns
     * gives its share, rounded such that the sum is exact. Of equal prices the first go. */
    uint64_t count;
    double threshold;         /* THRESHOLD: not negative */
    unsigned n, m;            /* NM: 1 <= n <= m <= 64; of equal prices the first stay */
    size_t block_cols;        /* columns per block, positive; NM rounds it up to a multiple of m */
    const double *row_weight; /* NULL, or a non-negative number per row */
} fp_obs_options;

/* SparseGPT's sweep (Frantar & Alistarh 2023): prices are taken when the sweep arrives at a block
 * (NM: at a group) of columns, removed weights become 0 and the columns to the right make up for
 * the error, in float32. mask: written, or read with GIVEN; out: the swept weights, zero where
 * removed, or NULL. a and d are fp_obs_factor's. */
size_t fp_obs_sweep_work(size_t rows, size_t cols, const fp_obs_options *options, int threads);
fp_status fp_obs_sweep(const fp_matrix *w, const float *a, const double *d,
                       const fp_obs_options *options, uint8_t *mask, float *out, int threads,
                       void *work, size_t work_bytes);

/* Exact least squares: the row on the support S of its mask that costs least, the solution of
 * H_SS w'_S = rhs_S, zero elsewhere. rhs (rows x cols, row-major): the targets' product with the
 * inputs, NULL for W H, which fits w itself; then a row that keeps everything stays as it is. out:
 * rows x cols of out_dtype, FP_F32 or FP_F64. FP_ERR_LAPACK if H is not positive definite.
 *
 * With rounds > 0 the mask changes too: in each round every row exchanges kept weights for as many
 * removed ones that promise to gain more, anywhere in the row or, with group > 0, within each group
 * of that many columns; and only if the row's exact cost then falls. A round takes about as long as
 * the least squares alone. */
size_t fp_refit_work(const uint8_t *mask, const double *rhs, size_t rows, size_t cols,
                     unsigned rounds, int threads);
fp_status fp_refit(const fp_matrix *w, uint8_t *mask, const double *h, const double *rhs,
                   unsigned rounds, size_t group, void *out, fp_dtype out_dtype, int threads,
                   void *work, size_t work_bytes);

/* What a change costs, per row: numerator (w' - w) C (w' - w)^T, denominator w C w^T. Only the
 * upper triangle of C (cols x cols, symmetric, row-major) is read. */
size_t fp_damage_work(size_t cols, int threads);
fp_status fp_damage(const fp_matrix *w, const fp_matrix *w_new, const double *c, double *numerator,
                    double *denominator, int threads, void *work, size_t work_bytes);

/* ---- dropout (methods/dropout.c) ----------------------------------------------------- */

/* y = x where it is kept, times 1 / (1 - p), and 0 * x where it is not: with probability p in
 * [0, 1), by `seed` and place alone. FP_F32 or FP_F64; y may be x. The gradient is the same
 * function of the gradient. */
fp_status fp_dropout(const fp_kernels *kernels, const void *x, fp_dtype dtype, size_t n, double p,
                     uint64_t seed, void *y, int threads);

/* ---- matrices that run packed (methods/packed.c) ------------------------------------- *
 * W (rows x cols) is cut into tiles of FP_TILE x FP_TILE, a row of tiles after the other; those at
 * the right and lower edges are smaller. A tile has one mask word for every row, bit j for its
 * column j, unused bits zero, and its kept values row after row. So products walk through the
 * values in order, forwards by rows and backwards by columns. */
enum { FP_TILE = 64 };

typedef struct fp_packed {
    size_t rows, cols;
    fp_dtype dtype;       /* of the values */
    const uint64_t *mask; /* fp_packed_words */
    const uint64_t
        *offset; /* fp_packed_tiles + 1: each tile's first value, and how many there are */
    const void *values;
    const float *scale; /* FP_I8: one per row, which its values are multiplied by; else NULL */
} fp_packed;

size_t fp_packed_words(size_t rows, size_t cols);
size_t fp_packed_tiles(size_t rows, size_t cols);
size_t fp_packed_kept(const fp_packed *p); /* values */

/* Mask words from a mask as packing has it, a bit string over the elements in row-major order. */
fp_status fp_packed_mask(const uint8_t *bits, size_t rows, size_t cols, uint64_t *mask,
                         int threads);
/* Offsets from mask words. FP_ERR_CORRUPT if an unused bit is set. */
fp_status fp_packed_offsets(const uint64_t *mask, size_t rows, size_t cols, uint64_t *offset,
                            int threads);

/* The kept elements of w (rows x cols, of item_size 2, 4 or 8 bytes). */
fp_status fp_packed_fill(const fp_kernels *kernels, const fp_packed *p, const void *w,
                         size_t item_size, void *values, int threads);
/* FP_F32 values as FP_I8: scale = largest |value| of the row / 127, rounded to nearest. */
fp_status fp_packed_quantise(const fp_packed *p, int8_t *values, float *scale, int threads);
/* The dense matrix, of the values' type or, from FP_I8, float. */
fp_status fp_packed_unpack(const fp_kernels *kernels, const fp_packed *p, void *w, int threads);

/* Rows ids[0 .. n) of the dense matrix, as above. FP_ERR_RANGE if there is no such row. */
fp_status fp_packed_lookup(const fp_kernels *kernels, const fp_packed *p, const int64_t *ids,
                           size_t n, void *rows, int threads);
/* dvalues = sum over i of drows[i] at the kept positions of row ids[i], where ids[i] is not
 * `ignored`. float, or double for FP_F64; the values are not read. */
fp_status fp_packed_lookup_gradient(const fp_kernels *kernels, const fp_packed *p,
                                    const int64_t *ids, size_t n, int64_t ignored,
                                    const void *drows, void *dvalues, int threads);

/* ---- products with packed matrices (methods/matmul.c) -------------------------------- *
 * x is (tokens x cols), y (tokens x rows), row-major without gaps; float, or double for FP_F64. No
 * dense copy of W is made. Work depends on the number of threads, results do not. */

typedef enum fp_matmul_method {
    FP_MATMUL_AUTO = 0,
    FP_MATMUL_VECTOR, /* few tokens at a time: values are expanded by the mask; forward alone */
    FP_MATMUL_SPARSE, /* a weight meets many tokens */
    FP_MATMUL_DENSE   /* BLAS on blocks of tiles, each unpacked before or packed after it */
} fp_matmul_method;

typedef enum fp_product { FP_FORWARD = 0, FP_BACKWARD, FP_GRADIENT } fp_product;

/* What FP_MATMUL_AUTO does at a number of tokens. */
fp_matmul_method fp_matmul_choice(const fp_kernels *kernels, const fp_packed *p, fp_product product,
                                  size_t tokens);

size_t fp_matmul_work(const fp_packed *p, size_t tokens, int threads); /* for any of these */

/* y = x W^T + bias (rows numbers, or NULL) */
fp_status fp_matmul_forward(const fp_kernels *kernels, const fp_packed *p, const void *x,
                            size_t tokens, const void *bias, void *y, fp_matmul_method method,
                            int threads, void *work, size_t work_bytes);
/* dx = dy W */
fp_status fp_matmul_backward(const fp_kernels *kernels, const fp_packed *p, const void *dy,
                             size_t tokens, void *dx, fp_matmul_method method, int threads,
                             void *work, size_t work_bytes);
/* dvalues = (dy^T x) at the kept positions; the values are not read, and not FP_I8. */
fp_status fp_matmul_gradient(const fp_kernels *kernels, const fp_packed *p, const void *dy,
                             const void *x, size_t tokens, void *dvalues, fp_matmul_method method,
                             int threads, void *work, size_t work_bytes);

#endif
