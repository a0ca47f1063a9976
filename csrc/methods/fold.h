/* What IRC and DWC share: one group of heads whose product M = L^T R is all that the model sees.
 *
 * L (head_dim x N) stacks the group's heads side by side, R is (head_dim x d, then the extra
 * column). F_left and F_right are the weighting of their columns: factors or diagonals of scales.
 * With F_left^T L^T = Q_L R_L, ||F_left^T (M - M') F_right|| = ||(X - X') F_right|| for X = R_L R:
 * every decision is taken on the small X (head_dim x d), never on the N x d product. */
#ifndef FOLDPRUNE_FOLD_H
#define FOLDPRUNE_FOLD_H

#include "foldprune.h"
#include "lapack.h"
#include "parallel.h"

typedef struct fp_fold_dims {
    size_t per_group;    /* heads of one group */
    int32_t h;           /* head_dim */
    int32_t n, N;        /* columns of one head's left part with bias; of all of the group's */
    int32_t d, de;       /* columns of right; with the extra one */
    int32_t k;           /* rows of X: min(N, h) */
    int32_t lapack_work; /* doubles */
} fp_fold_dims;

/* One worker's buffers. Matrices are column-major as LAPACK has them; a row-major (r x c) matrix is
 * the column-major (c x r) one. */
typedef struct fp_fold_buffers {
    double *left;   /* row-major h x N */
    double *right;  /* row-major h x de */
    double *qr;     /* N x h */
    double *r_left; /* k x h */
    double *seen;   /* row-major h x d: right times its weighting */
    double *x;      /* k x de: its columns times fp_fold_call's scale */
    double *white;  /* k x d: the weighted product; x itself where there is no right_factor */
    double *y;      /* k x de: what a factorisation overwrites */
    double *rest;   /* row-major h x d: what a regression leaves of seen */
    double *u;      /* k x k */
    double *vt;     /* min(k, d) x d */
    double *s;      /* h */
    double *tau;    /* max(h, d) */
    double *basis;  /* h x h: columns that left is projected on */
    double *mix;    /* h x h */
    double *fitted; /* h x h: coefficients of a second fit */
    double *panel;  /* max(h, d) x h: a least-squares problem's matrix */
    double *target; /* max(h, d) x (h + 1): its right-hand sides */
    double *lapack;
    int32_t *pivots; /* d */
    int32_t *ints;   /* LAPACK's integer workspace */
} fp_fold_buffers;

/* One call over all groups: context of a task whose items are the groups. */
typedef struct fp_fold_call {
    const fp_heads *heads;
    fp_fold_dims dims;
    const int32_t *ranks;
    const int32_t *columns;
    const double *scale; /* d: root mean square of what right's columns meet; NULL for 1 */
    fp_fold_out *out;
    double *squared, *energy, *a, *b;
    fp_status *status; /* per group */
    char *buffers;
    size_t stride; /* bytes per worker */
} fp_fold_call;

/* Checks everything, lays out the workspace, runs task over the groups. The first failure, if any.
 */
fp_status fp_fold_run(fp_fold_call *call, fp_task task, int threads, void *work, size_t work_bytes);

fp_fold_buffers fp_fold_worker(const fp_fold_call *call, int worker);

/* Loads group j and computes X; returns ||M||^2. */
fp_status fp_fold_load(const fp_fold_call *call, size_t group, fp_fold_buffers *w, double *energy);

/* Sum of squares. */
double fp_fold_energy(const double *x, size_t n);

/* Thin SVD of `rows` x d matrix y (overwritten): u, s, vt. */
fp_status fp_fold_svd(const fp_fold_dims *m, int32_t rows, const int32_t cols, fp_fold_buffers *w);

/* What counts as rounding noise beside 1. */
double fp_fold_noise(const fp_fold_dims *m);

/* How many of s[0 .. n), descending, are above rounding noise beside `largest`. */
int32_t fp_fold_numerical_rank(const fp_fold_dims *m, const double *s, int32_t n, int32_t stride,
                               double largest);

/* Column-pivoted QR of y's first d of de columns (rows x de, overwritten; `extra` more columns are
 * carried along). Leaves R11 in y's first rank columns, R11^-1 times the rest in the other ones,
 * and pivots (from 0) in w->pivots. */
fp_status fp_fold_gauge(const fp_fold_dims *m, int32_t rows, int32_t extra, fp_fold_buffers *w,
                        int32_t *rank);

/* Writes [identity | solved rest] to out->right and pivots to out->pivots. */
void fp_fold_write_gauge(const fp_fold_call *call, size_t group, const fp_fold_buffers *w,
                         int32_t rows, int32_t rank);

/* What column j of right meets. */
double fp_fold_right_scale(const fp_fold_call *call, int32_t column);

/* basis (h x rank) = the columns of right (h x de) that pivots name. */
void fp_fold_pick_columns(const fp_fold_dims *m, const fp_fold_buffers *w, const int32_t *pivots,
                          int32_t rank);

/* out->left of every head of the group = basis^T left. */
void fp_fold_project(const fp_fold_call *call, size_t group, const fp_fold_buffers *w,
                     int32_t rank);

/* Zeroes the group's part of the outputs. */
void fp_fold_clear(const fp_fold_call *call, size_t group);

#endif
