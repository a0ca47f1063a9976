#include "cholesky.h"

#include <math.h>
#include <string.h>

#include "lapack.h"
#include "parallel.h"

static const double ONE = 1.0, MINUS = -1.0;
static const int32_t TILE = 128;

typedef struct panel {
    double *a;
    int32_t n, begin, end; /* columns of the panel */
} panel;

static int32_t tile_begin(const panel *p, size_t tile)
{
    return p->end + (int32_t)tile * TILE;
}

static int32_t tile_size(const panel *p, int32_t begin)
{
    return p->n - begin < TILE ? p->n - begin : TILE;
}

static double *at(const panel *p, int32_t row, int32_t col)
{
    return p->a + (size_t)col * (size_t)p->n + (size_t)row;
}

/* A tile of rows below the diagonal block. */
static void solve_tile(void *context, size_t item, int worker)
{
    panel *p = context;
    int32_t row = tile_begin(p, item), rows = tile_size(p, row), cols = p->end - p->begin;
    (void)worker;
    fp_dtrsm("R", "L", "T", "N", &rows, &cols, &ONE, at(p, p->begin, p->begin), &p->n,
             at(p, row, p->begin), &p->n, 1, 1, 1, 1);
}

/* A tile of the rest, on or below its diagonal: tiles of the triangle, row by row. */
static void update_tile(void *context, size_t item, int worker)
{
    panel *p = context;
    size_t i = (size_t)((sqrt(8.0 * (double)item + 1.0) - 1.0) / 2.0);
    int32_t row = tile_begin(p, i), rows = tile_size(p, row);
    int32_t col = tile_begin(p, item - i * (i + 1) / 2), cols = tile_size(p, col);
    int32_t inner = p->end - p->begin;
    (void)worker;
    if (row == col)
        fp_dsyrk("L", "N", &rows, &inner, &MINUS, at(p, row, p->begin), &p->n, &ONE,
                 at(p, row, row), &p->n, 1, 1);
    else
        fp_dgemm("N", "T", &rows, &cols, &inner, &MINUS, at(p, row, p->begin), &p->n,
                 at(p, col, p->begin), &p->n, &ONE, at(p, row, col), &p->n, 1, 1);
}

fp_status fp_cholesky(double *a, size_t n, int threads)
{
    if (n > INT32_MAX / 2)
        return FP_ERR_OVERFLOW;
    panel p = {.a = a, .n = (int32_t)n};
    for (; p.begin < p.n; p.begin = p.end) {
        int32_t size = p.n - p.begin < TILE ? p.n - p.begin : TILE, info;
        fp_dpotrf("L", &size, at(&p, p.begin, p.begin), &p.n, &info, 1);
        p.end = p.begin + size;
        for (int32_t i = p.begin; !info && i < p.end; i++) /* a NaN may pass dpotrf by */
            info = !(*at(&p, i, i) > 0) || isinf(*at(&p, i, i));
        if (info)
            return FP_ERR_LAPACK;
        size_t tiles = (size_t)((p.n - p.end + TILE - 1) / TILE);
        fp_parallel_for(tiles, threads, solve_tile, &p);
        fp_parallel_for(tiles * (tiles + 1) / 2, threads, update_tile, &p);
    }
    return FP_OK;
}

typedef struct inversion {
    const double *l;
    double *inverse;
    int32_t n;
} inversion;

/* Columns [begin, begin + TILE) of the inverse, on and below the diagonal: above it nothing of the
 * right-hand side or of the solution is needed. */
static void invert_columns(void *context, size_t item, int worker)
{
    inversion *c = context;
    int32_t begin = (int32_t)item * TILE, cols = c->n - begin < TILE ? c->n - begin : TILE;
    int32_t rows = c->n - begin;
    size_t corner = (size_t)begin * (size_t)c->n + (size_t)begin;
    (void)worker;
    for (int32_t j = 0; j < cols; j++) {
        double *column = c->inverse + corner + (size_t)j * (size_t)c->n;
        memset(column, 0, (size_t)rows * sizeof *column);
        column[j] = 1.0;
    }
    fp_dtrsm("L", "L", "N", "N", &rows, &cols, &ONE, c->l + corner, &c->n, c->inverse + corner,
             &c->n, 1, 1, 1, 1);
    fp_dtrsm("L", "L", "T", "N", &rows, &cols, &ONE, c->l + corner, &c->n, c->inverse + corner,
             &c->n, 1, 1, 1, 1);
}

static void mirror_columns(void *context, size_t item, int worker)
{
    inversion *c = context;
    size_t n = (size_t)c->n, begin = item * (size_t)TILE;
    size_t end = begin + (size_t)TILE < n ? begin + (size_t)TILE : n;
    (void)worker;
    for (size_t j = begin; j < end; j++)
        for (size_t i = 0; i < j; i++)
            c->inverse[j * n + i] = c->inverse[i * n + j];
}

void fp_cholesky_inverse(const double *l, size_t n, double *inverse, int threads)
{
    inversion c = {l, inverse, (int32_t)n};
    size_t tiles = (n + (size_t)TILE - 1) / (size_t)TILE;
    fp_parallel_for(tiles, threads, invert_columns, &c);
    fp_parallel_for(tiles, threads, mirror_columns, &c);
}
