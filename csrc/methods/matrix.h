/* Strided views of any supported element type, read into float64. */
#ifndef FOLDPRUNE_MATRIX_H
#define FOLDPRUNE_MATRIX_H

#include "foldprune.h"

/* y[i * y_row + j * y_col] = m[first_row + i][j]; distances in elements. */
void fp_matrix_load(const fp_matrix *m, size_t first_row, size_t rows, double *y, size_t y_row,
                    size_t y_col);

/* dtype known, data present unless empty. */
fp_status fp_matrix_check(const fp_matrix *m);

#endif
