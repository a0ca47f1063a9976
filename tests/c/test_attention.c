/* Attention on odd shapes against its definition, under the sanitizers: every workspace and array
 * has exactly the size that was asked for. */
#include <math.h>

#include "foldprune_attention.h"
#include "lapack.h"
#include "methods_testing.h"

typedef struct shape {
    size_t batch, heads, kv_heads, n, m, rank, dim;
} shape;

static double get(const void *x, fp_dtype dtype, size_t i)
{
    return dtype == FP_F64 ? ((const double *)x)[i] : (double)((const float *)x)[i];
}

static void set(void *x, fp_dtype dtype, size_t i, double value)
{
    if (dtype == FP_F64)
        ((double *)x)[i] = value;
    else
        ((float *)x)[i] = (float)value;
}

/* (batch x heads x rows x columns) in memory as (batch x rows x heads x columns). */
static fp_rows rows_new(fp_dtype dtype, size_t batch, size_t heads, size_t rows, size_t columns,
                        int random)
{
    size_t size = batch * heads * rows * columns;
    fp_rows r = {exactly(size * fp_dtype_size(dtype)), (ptrdiff_t)(rows * heads * columns),
                 (ptrdiff_t)columns, (ptrdiff_t)(heads * columns)};
    for (size_t i = 0; random && i < size; i++)
        set(r.data, dtype, i, 2 * uniform());
    return r;
}

static size_t place(const fp_rows *r, size_t batch, size_t head, size_t row)
{
    return (size_t)((ptrdiff_t)batch * r->batch + (ptrdiff_t)head * r->head +
                    (ptrdiff_t)row * r->row);
}

static int sees(const fp_attention *a, size_t batch, size_t i, size_t j)
{
    return (!a->key_mask || a->key_mask[batch * a->m + j]) && (!a->causal || j + a->n <= i + a->m);
}

static double logit(const fp_attention *a, size_t batch, size_t head, size_t i, size_t j)
{
    double sum = 0;
    for (size_t c = 0; c < a->rank; c++)
        sum +=
            get(a->q.data, a->dtype, place(&a->q, batch, head, i) + c) *
            get(a->k.data, a->dtype, place(&a->k, batch, head / (a->heads / a->kv_heads), j) + c);
    return a->scale * sum;
}

/* What dropout makes of a weight. */
static double dropped(const fp_attention *a, size_t batch, size_t head, size_t i, size_t j,
                      double weight)
{
    uint64_t row = ((uint64_t)batch * a->heads + head) * a->n + i;
    return is_dropped(a->seed, row, j, a->dropout) ? 0 : weight / (1 - a->dropout);
}

/* Output of one query by the definition; returns the log-sum-exp. */
static double expected_row(const fp_attention *a, size_t batch, size_t head, size_t i, double *out)
{
    double top = -INFINITY, total = 0;
    size_t kv_head = head / (a->heads / a->kv_heads);
    memset(out, 0, a->value_dim * sizeof *out);
    for (size_t j = 0; j < a->m; j++)
        if (sees(a, batch, i, j))
            top = fmax(top, logit(a, batch, head, i, j));
    for (size_t j = 0; j < a->m; j++) {
        if (!sees(a, batch, i, j))
            continue;
        double p = exp(logit(a, batch, head, i, j) - top);
        total += p;
        p = dropped(a, batch, head, i, j, p);
        for (size_t c = 0; c < a->value_dim; c++)
            out[c] += p * get(a->v.data, a->dtype, place(&a->v, batch, kv_head, j) + c);
    }
    for (size_t c = 0; c < a->value_dim && total > 0; c++)
        out[c] /= total;
    return total > 0 ? top + log(total) : -INFINITY;
}

static double objective(const fp_attention *a, const fp_rows *dout)
{
    double sum = 0, *out = exactly(a->value_dim * sizeof *out);
    for (size_t b = 0; b < a->batch; b++)
        for (size_t h = 0; h < a->heads; h++)
            for (size_t i = 0; i < a->n; i++) {
                expected_row(a, b, h, i, out);
                for (size_t c = 0; c < a->value_dim; c++)
                    sum += out[c] * get(dout->data, a->dtype, place(dout, b, h, i) + c);
            }
    free(out);
    return sum;
}

/* A derivative along a random direction against a difference, in float64. */
static void check_gradient(const fp_attention *a, const fp_rows *dout, const fp_rows *input,
                           const fp_rows *gradient, size_t size)
{
    double *x = input->data, *step = exactly(size * sizeof *step), value[2], slope = 0;
    for (size_t i = 0; i < size; i++) {
        step[i] = uniform();
        slope += step[i] * ((const double *)gradient->data)[i];
    }
    for (int side = 0; side < 2; side++) {
        double h = side ? -1e-5 : 1e-5;
        for (size_t i = 0; i < size; i++)
            x[i] += h * step[i];
        value[side] = objective(a, dout);
        for (size_t i = 0; i < size; i++)
            x[i] -= h * step[i];
    }
    double difference = (value[0] - value[1]) / 2e-5;
    CHECK(fabs(slope - difference) <= 1e-5 * (1 + fabs(difference)));
    free(step);
}

static void test_case(shape s, fp_dtype dtype, int causal, int masked, fp_attention_method method,
                      double dropout, const fp_kernels *kernels, int threads)
{
    uint8_t *mask = exactly(s.batch * s.m);
    for (size_t i = 0; i < s.batch * s.m; i++)
        mask[i] = masked == 2 ? i >= s.m : uniform() < 0.3;
    fp_attention a = {.dtype = dtype,
                      .batch = s.batch,
                      .heads = s.heads,
                      .kv_heads = s.kv_heads,
                      .n = s.n,
                      .m = s.m,
                      .rank = s.rank,
                      .value_dim = s.dim,
                      .q = rows_new(dtype, s.batch, s.heads, s.n, s.rank, 1),
                      .k = rows_new(dtype, s.batch, s.kv_heads, s.m, s.rank, 1),
                      .v = rows_new(dtype, s.batch, s.kv_heads, s.m, s.dim, 1),
                      .scale = 0.75,
                      .causal = causal,
                      .key_mask = masked ? mask : NULL,
                      .method = method,
                      .tol = dtype == FP_F64 ? 1e-10 : 1e-6,
                      .dropout = dropout,
                      .seed = 20261128};
    fp_rows out = rows_new(dtype, s.batch, s.heads, s.n, s.dim, 0);
    fp_rows dout = rows_new(dtype, s.batch, s.heads, s.n, s.dim, 1);
    fp_rows dq = rows_new(dtype, s.batch, s.heads, s.n, s.rank, 0);
    fp_rows dk = rows_new(dtype, s.batch, s.kv_heads, s.m, s.rank, 0);
    fp_rows dv = rows_new(dtype, s.batch, s.kv_heads, s.m, s.dim, 0);
    double *lse = exactly(s.batch * s.heads * s.n * sizeof *lse);
    double *expected = exactly(s.dim * sizeof *expected);
    int32_t *nodes = exactly(s.batch * s.kv_heads * sizeof *nodes);
    size_t bytes = fp_attention_work(&a, threads);
    void *work = exactly(bytes);
    CHECK(fp_attention_forward(kernels, &a, out, lse, nodes, threads, work, bytes) == FP_OK);
    free(work);
    double worst = 0, tol = dtype == FP_F64 ? 1e-9 : 1e-5;
    for (size_t b = 0; b < s.batch; b++)
        for (size_t h = 0; h < s.heads; h++)
            for (size_t i = 0; i < s.n; i++) {
                double at = expected_row(&a, b, h, i, expected);
                double got = lse[(b * s.heads + h) * s.n + i];
                worst = fmax(worst, at == got ? 0 : fabs(at - got)); /* -inf - -inf is NaN */
                for (size_t c = 0; c < s.dim; c++)
                    worst = fmax(
                        worst, fabs(expected[c] - get(out.data, dtype, place(&out, b, h, i) + c)));
            }
    CHECK(worst <= tol);

    bytes = fp_attention_backward_work(&a, threads);
    work = exactly(bytes);
    CHECK(fp_attention_backward(kernels, &a, out, lse, nodes, dout, dq, dk, dv, threads, work,
                                bytes) == FP_OK);
    free(work);
    if (dtype == FP_F64) {
        check_gradient(&a, &dout, &a.q, &dq, s.batch * s.heads * s.n * s.rank);
        check_gradient(&a, &dout, &a.k, &dk, s.batch * s.kv_heads * s.m * s.rank);
        check_gradient(&a, &dout, &a.v, &dv, s.batch * s.kv_heads * s.m * s.dim);
    }
    void *all[] = {a.q.data, a.k.data, a.v.data, out.data, dout.data, dq.data,
                   dk.data,  dv.data,  lse,      expected, nodes,     mask};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static void test_state(fp_dtype dtype, int threads)
{
    enum { HEADS = 4, KV = 2, N = 70, M = 33, DIM = 5, NODES = 80 };
    fp_attention a = {.dtype = dtype,
                      .batch = 1,
                      .heads = HEADS,
                      .kv_heads = KV,
                      .n = N,
                      .m = M,
                      .rank = 1,
                      .value_dim = DIM,
                      .q = rows_new(dtype, 1, HEADS, N, 1, 1),
                      .k = rows_new(dtype, 1, KV, M, 1, 1),
                      .v = rows_new(dtype, 1, KV, M, DIM, 1),
                      .scale = 0.75,
                      .tol = 1e-6};
    const double low[KV] = {-2, -2}, high[KV] = {2, 2};
    double range[2 * KV] = {INFINITY, -INFINITY, INFINITY, -INFINITY}, size[KV] = {0};
    double *sum = calloc(KV * NODES, sizeof *sum), expected[DIM], worst = 0;
    double *reference = calloc(KV * NODES, sizeof *reference);
    double *sums = calloc(KV * NODES * DIM, sizeof *sums);
    fp_nodes_state s = {NODES, low, high, range, size, sum, reference, sums};
    fp_rows out = rows_new(dtype, 1, HEADS, N, DIM, 0);
    int32_t needed[KV];

    fp_attention keys = a, queries = a;
    keys.n = 0;
    queries.m = 0;
    size_t bytes = fp_nodes_work(&keys, threads);
    void *work = exactly(bytes);
    CHECK(fp_nodes_append(fp_kernels_default(), &keys, &s, threads, work, bytes) == FP_OK);
    CHECK(fp_nodes_append(fp_kernels_default(), &a, &s, threads, work, bytes) == FP_ERR_ARGUMENT);
    free(work);
    bytes = fp_nodes_work(&queries, threads);
    work = exactly(bytes);
    CHECK(fp_nodes_attend(&queries, &s, out, needed, threads, work, bytes) == FP_OK);
    for (size_t h = 0; h < HEADS; h++)
        for (size_t i = 0; i < N; i++) {
            expected_row(&a, 0, h, i, expected);
            for (size_t c = 0; c < DIM; c++)
                worst =
                    fmax(worst, fabs(expected[c] - get(out.data, dtype, place(&out, 0, h, i) + c)));
        }
    CHECK(worst <= 1e-5);
    queries.scale = 10; /* out of the range */
    CHECK(fp_nodes_attend(&queries, &s, out, needed, threads, work, bytes) == FP_ERR_RANGE);
    s.nodes = 20;
    CHECK(fp_nodes_attend(&queries, &s, out, needed, threads, work, bytes) == FP_ERR_RANGE);
    void *all[] = {work, sum, reference, sums, out.data, a.q.data, a.k.data, a.v.data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static void test_refusals(void)
{
    fp_attention a = {.dtype = FP_F32, .batch = 1, .heads = 3, .kv_heads = 2, .tol = 1};
    CHECK(fp_attention_work(&a, 1) == 0); /* 2 does not divide 3 */
    a.kv_heads = 0;
    CHECK(fp_attention_work(&a, 1) == 0);
    a.kv_heads = 3;
    CHECK(fp_attention_work(&a, 1) > 0);
    a.dtype = FP_F16;
    CHECK(fp_attention_work(&a, 1) == 0);
    a.dtype = FP_F32;
    a.n = SIZE_MAX / 4;
    CHECK(fp_attention_work(&a, 1) == 0);
    a.n = 1;
    a.rank = 2;
    CHECK(fp_attention_work(&a, 1) == 0); /* rows that overlap */
    a.q.row = a.k.row = 2;
    CHECK(fp_attention_work(&a, 1) > 0);
    a.method = FP_ATTENTION_NODES;
    CHECK(fp_attention_work(&a, 1) == 0);
    a.method = FP_ATTENTION_EXACT;
    const double wrong[] = {-0.1, 1, NAN};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        a.dropout = wrong[i];
        CHECK(fp_attention_work(&a, 1) == 0);
    }
    a.dropout = 0.5;
    CHECK(fp_attention_work(&a, 1) > 0);
    a.rank = a.q.row = a.k.row = 1;
    a.method = FP_ATTENTION_NODES;
    CHECK(fp_attention_work(&a, 1) == 0); /* nodes know no single weights */
    a.method = FP_ATTENTION_EXACT;
    a.tol = NAN;
    CHECK(fp_attention_work(&a, 1) == 0);
}

int main(void)
{
    fp_blas_set_threads(1);
    const shape shapes[] = {
        {1, 1, 1, 1, 1, 1, 1},    {2, 4, 2, 5, 9, 2, 3},     {1, 2, 1, 65, 130, 1, 3},
        {1, 2, 2, 130, 65, 3, 2}, {1, 1, 1, 140, 290, 1, 2}, {1, 2, 1, 3, 4, 0, 2},
        {1, 2, 1, 4, 3, 1, 0},    {1, 1, 1, 0, 3, 1, 2},     {1, 1, 1, 3, 0, 1, 2},
        {0, 2, 1, 3, 3, 1, 2},    {1, 1, 1, 300, 300, 1, 1},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int dtype = FP_F32; dtype <= FP_F64; dtype++)
            for (int causal = 0; causal < 2; causal++)
                for (int masked = 0; masked < 3; masked++)
                    for (int method = FP_ATTENTION_AUTO; method <= FP_ATTENTION_NODES; method++) {
                        if (method != FP_ATTENTION_NODES || shapes[i].rank == 1)
                            test_case(shapes[i], (fp_dtype)dtype, causal, masked,
                                      (fp_attention_method)method, 0, fp_kernels_default(),
                                      1 + (int)i % 2);
                        if (method != FP_ATTENTION_NODES)
                            test_case(shapes[i], (fp_dtype)dtype, causal, masked,
                                      (fp_attention_method)method, 0.4, fp_kernels_default(),
                                      1 + (int)i % 2);
                    }
    const char *name;
    for (size_t i = 0; (name = fp_isa_name(i)) != NULL; i++)
        if (fp_kernels_find(name))
            test_case(shapes[4], FP_F32, 1, 1, FP_ATTENTION_NODES, 0, fp_kernels_find(name), 2);
    for (int dtype = FP_F32; dtype <= FP_F64; dtype++)
        test_state((fp_dtype)dtype, 1 + dtype);
    test_refusals();
    return finish();
}
