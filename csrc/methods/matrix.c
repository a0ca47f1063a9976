#include "matrix.h"

#include <string.h>

#include "kernels.h"

fp_status fp_matrix_check(const fp_matrix *m)
{
    if (!fp_dtype_size(m->dtype))
        return FP_ERR_DTYPE;
    return m->data || !m->rows || !m->cols ? FP_OK : FP_ERR_ARGUMENT;
}

void fp_matrix_load(const fp_matrix *m, size_t first_row, size_t rows, double *y, size_t y_row,
                    size_t y_col)
{
    for (size_t i = 0; i < rows; i++) {
        const char *source = (const char *)m->data + (ptrdiff_t)(first_row + i) * m->row_stride;
        double *target = y + i * y_row;
        for (size_t j = 0; j < m->cols; j++, source += m->col_stride, target += y_col) {
            float single;
            uint32_t bits;
            uint16_t half;
            switch (m->dtype) { /* memcpy: views need not be aligned */
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
            }
        }
    }
}
