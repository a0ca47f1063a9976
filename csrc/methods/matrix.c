#include "matrix.h"

#include <string.h>

#include "kernels.h"

fp_status fp_matrix_check(const fp_matrix *m)
{
    if (!fp_dtype_size(m->dtype))
        return FP_ERR_DTYPE;
    return m->data || !m->rows || !m->cols ? FP_OK : FP_ERR_ARGUMENT;
}

/* A row without gaps, of the usual types: loops that compilers vectorise. */
static int load_dense_row(const fp_matrix *m, const char *source, double *y)
{
    if (m->dtype == FP_F64 && m->col_stride == sizeof(double)) {
        memcpy(y, source, m->cols * sizeof *y);
        return 1;
    }
    if (m->dtype != FP_F32 || m->col_stride != sizeof(float))
        return 0;
    for (size_t j = 0; j < m->cols; j++) {
        float single; /* memcpy: views need not be aligned */
        memcpy(&single, source + j * sizeof single, sizeof single);
        y[j] = (double)single;
    }
    return 1;
}

void fp_matrix_load(const fp_matrix *m, size_t first_row, size_t rows, double *y, size_t y_row,
                    size_t y_col)
{
    for (size_t i = 0; i < rows; i++) {
        const char *source = (const char *)m->data + (ptrdiff_t)(first_row + i) * m->row_stride;
        double *target = y + i * y_row;
        if (y_col == 1 && load_dense_row(m, source, target))
            continue;
        for (size_t j = 0; j < m->cols; j++, source += m->col_stride, target += y_col) {
            float single;
            uint32_t bits;
            uint16_t half;
            switch (m->dtype) {
            case FP_F32:
                memcpy(&single, source, sizeof single);
                *target = (double)single;
                break;
            case FP_F64:
                memcpy(target, source, sizeof *target);
                break;
            case FP_F16:
                memcpy(&half, source, sizeof half);
                fp_half_to_float_scalar(&half, 1, &single);
                *target = (double)single;
                break;
            case FP_BF16:
                memcpy(&half, source, sizeof half);
                bits = (uint32_t)half << 16;
                memcpy(&single, &bits, sizeof single);
                *target = (double)single;
                break;
            case FP_I8: /* fp_matrix_check has refused it */
                break;
            }
        }
    }
}
