/* Between Python and the core: the only folder that sees Python.h. */
#ifndef FOLDPRUNE_BINDING_H
#define FOLDPRUNE_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL foldprune_array_api
#ifndef FOLDPRUNE_IMPORT_ARRAY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "foldprune.h"

typedef struct module_state {
    PyArray_Descr *bfloat16; /* ml_dtypes' registered type */
    const fp_kernels *kernels;
} module_state;

module_state *state_of(PyObject *module);

/* Raises the exception that belongs to a status and returns NULL. */
PyObject *raise_status(fp_status status);

/* The array, or with a failed status NULL and its exception; takes the reference. */
PyObject *array_or_raise(PyArrayObject *array, fp_status status);

/* Parses args and kwargs by `names`; returns NULL from the function if they do not fit. */
#define PARSE(format, ...)                                                                         \
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, __VA_ARGS__))                    \
        return NULL;

/* 0, or -1 with TypeError set. */
int dtype_of(PyObject *module, PyArrayObject *array, fp_dtype *dtype);

/* A contiguous, aligned array of native byte order with one of the four dtypes, or (elements of 2,
 * 4 or 8 bytes) of any dtype. Borrowed; NULL with an exception set. */
PyArrayObject *contiguous(PyObject *object, const char *what);

/* 1-D contiguous array of one NumPy type. None gives NULL without an exception if allow_none. */
int typed_vector(PyObject *object, int type, const char *what, int allow_none, PyArrayObject **out);

/* The data of a contiguous array of one type and shape (cols 0: a vector); NULL with an exception
 * set. */
void *data_of(PyObject *object, const char *what, int type, size_t rows, size_t cols);

/* A fresh array, likewise. */
PyArrayObject *new_matrix(int type, size_t rows, size_t cols);

/* Which of the names it is, the last one followed by NULL; -1 with ValueError set if none. */
int choice_from(const char *name, const char *what, const char *const *choices, int *choice);

/* O& converter: a non-negative integer that fits 64 bits. */
int as_count(PyObject *object, void *count);

/* (x, scale, col_scale or None) as a scored matrix; borrows from the tuple. */
int scored_from(PyObject *module, PyObject *tuple, fp_scored *out);

/* Strided 2-D (or with vector = 1 1-D) view; None leaves data NULL if allow_none. */
int matrix_from(PyObject *module, PyObject *object, const char *what, int vector, int allow_none,
                fp_matrix *out);

/* The variant called `isa`, or the default for NULL; NULL with RuntimeError set. */
const fp_kernels *kernels_named(PyObject *module, const char *isa);

/* Bytes of workspace at the start of a cache line, which vectors of activations must not straddle.
 * NULL with MemoryError set. */
void *new_work(size_t bytes);
void free_work(void *work);

/* Each is a METH_VARARGS | METH_KEYWORDS function; foldprune/_core.pyi says what they take. */
#define DECLARE(name) PyObject *py_##name(PyObject *module, PyObject *args, PyObject *kwargs)
DECLARE(all_finite);
DECLARE(energy);
DECLARE(histogram);
DECLARE(select);
DECLARE(mask_threshold);
DECLARE(mask_rows);
DECLARE(mask_nm);
DECLARE(mask_blocks);
DECLARE(mask_count);
DECLARE(block_scores);
DECLARE(pack);
DECLARE(unpack);
DECLARE(irc_spectrum);
DECLARE(irc);
DECLARE(dwc_spectrum);
DECLARE(dwc_select);
DECLARE(dwc_remainder);
DECLARE(rope_scores);
DECLARE(rope);
DECLARE(check_rows);
DECLARE(moments_update);
DECLARE(square_sums);
DECLARE(count_rows);
DECLARE(obs_factor);
DECLARE(obs_sweep);
DECLARE(refit);
DECLARE(swap);
DECLARE(damage);
DECLARE(attention);
DECLARE(attention_backward);
DECLARE(nodes_append);
DECLARE(nodes_attend);
DECLARE(dropout);
DECLARE(packed_mask);
DECLARE(packed_offsets);
DECLARE(packed_fill);
DECLARE(packed_quantise);
DECLARE(packed_unpack);
DECLARE(packed_lookup);
DECLARE(packed_lookup_gradient);
DECLARE(matmul);
DECLARE(matmul_backward);
DECLARE(matmul_gradient);
DECLARE(matmul_choice);
#undef DECLARE

#endif
