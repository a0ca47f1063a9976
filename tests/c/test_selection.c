/* Selection, masks and packing on odd shapes, against plain definitions. */
#include "methods_testing.h"

/* How many elements must leave before element i of t: smaller ones, and equal ones before it. */
static size_t rank_of(const fp_scored *t, size_t i, size_t begin, size_t end)
{
    size_t rank = 0;
    double own = value_of(t, i);
    for (size_t j = begin; j < end; j++) {
        double other = value_of(t, j);
        rank += other < own || (other == own && j < i);
    }
    return rank;
}

static void test_selection(fp_dtype dtype, size_t rows, size_t cols, int coarse, int threads)
{
    size_t n = rows * cols;
    const fp_kernels *kernels = fp_kernels_default();
    fp_scored t = {random_matrix(dtype, n, coarse), dtype, rows, cols, 1.0, NULL};
    uint8_t *mask = exactly(fp_mask_bytes(n));
    size_t select_bytes = fp_select_work(threads), mask_bytes = fp_mask_work(&t);
    void *select_work = workspace(select_bytes), *mask_work = workspace(mask_bytes);
    for (size_t step = 0; step <= 4; step++) {
        size_t k = n * step / 4;
        fp_pack_plan plan;
        fp_threshold threshold;
        uint64_t used;
        CHECK(!fp_select(kernels, &t, 1, k, &threshold, threads, select_work, select_bytes));
        CHECK(!fp_mask_threshold(kernels, &t, threshold, mask, &used, threads, mask_work,
                                 mask_bytes));
        int right = 1;
        for (size_t i = 0; i < n; i++)
            right &= bit(mask, i) == (rank_of(&t, i, 0, n) >= k);
        CHECK(right);
        CHECK(!fp_pack_prepare(kernels, mask, n, &plan, threads) && plan.kept == n - k);

        void *values = exactly(plan.kept * fp_dtype_size(dtype)),
             *back = exactly(n * fp_dtype_size(dtype));
        CHECK(!fp_pack(kernels, &plan, mask, t.x, fp_dtype_size(dtype), values, threads));
        CHECK(!fp_unpack(kernels, &plan, mask, values, fp_dtype_size(dtype), back, threads));
        fp_scored unpacked = t;
        unpacked.x = back;
        for (size_t i = 0; i < n; i++)
            right &= value_of(&unpacked, i) == (bit(mask, i) ? value_of(&t, i) : 0.0);
        CHECK(right);
        CHECK(fp_pack(kernels, &plan, mask, t.x, 3, values, threads) == FP_ERR_DTYPE);
        if (n % 8) {
            mask[n / 8] |= 0x80;
            CHECK(fp_pack_prepare(kernels, mask, n, &plan, threads) == FP_ERR_CORRUPT);
        }
        free(values);
        free(back);
    }
    CHECK(fp_select(kernels, &t, 1, n + 1, &(fp_threshold){0}, threads, select_work,
                    select_bytes) == FP_ERR_RANGE);

    size_t k = cols / 2, bytes = fp_mask_rows_work(&t, threads);
    void *work = workspace(bytes);
    CHECK(!fp_mask_rows(&t, k, mask, threads, work, bytes));
    int right = 1;
    for (size_t i = 0; i < n; i++)
        right &= bit(mask, i) == (rank_of(&t, i, i / cols * cols, (i / cols + 1) * cols) >= k);
    CHECK(right);
    release(work, bytes);

    CHECK(!fp_mask_nm(&t, 2, 4, mask, threads));
    for (size_t row = 0; row < rows; row++)
        for (size_t g = 0; g < cols; g += 4) {
            size_t size = cols - g < 4 ? cols - g : 4, count = 0;
            for (size_t j = 0; j < size; j++)
                count += (size_t)bit(mask, row * cols + g + j);
            right &= count == (size < 2 ? size : 2);
        }
    CHECK(right);

    size_t grid_rows = (rows + 2) / 3, grid_cols = (cols + 4) / 5;
    float *scores = exactly(grid_rows * grid_cols * sizeof *scores);
    uint8_t *blocks = exactly(fp_mask_bytes(grid_rows * grid_cols));
    CHECK(!fp_block_scores(&t, 3, 5, scores, threads));
    memset(blocks, 0, fp_mask_bytes(grid_rows * grid_cols));
    for (size_t i = 0; i < grid_rows * grid_cols; i += 2)
        blocks[i >> 3] |= (uint8_t)(1u << (i & 7));
    CHECK(!fp_mask_blocks(blocks, rows, cols, 3, 5, mask, threads));
    for (size_t i = 0; i < n; i++)
        right &= bit(mask, i) == bit(blocks, i / cols / 3 * grid_cols + i % cols / 5);
    CHECK(right);

    release(select_work, select_bytes);
    release(mask_work, mask_bytes);
    free(scores);
    free(blocks);
    free(mask);
    free((void *)(uintptr_t)t.x);
}

int main(void)
{
    const size_t shapes[][2] = {{1, 1}, {1, 9}, {9, 1}, {7, 13}, {16, 24}, {33, 31}};
    for (int dtype = FP_F32; dtype <= FP_BF16; dtype++)
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
            for (int coarse = 0; coarse < 2; coarse++)
                for (int threads = 1; threads <= 2; threads++)
                    test_selection((fp_dtype)dtype, shapes[s][0], shapes[s][1], coarse, threads);
    return finish();
}
