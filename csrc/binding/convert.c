/* Checked views of Python arguments. Nothing here copies. */
#include "binding.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

PyObject *raise_status(fp_status status)
{
    PyErr_SetString(status == FP_ERR_DTYPE ? PyExc_TypeError : PyExc_ValueError,
                    fp_status_text(status));
    return NULL;
}

PyObject *array_or_raise(PyArrayObject *array, fp_status status)
{
    if (!status)
        return (PyObject *)array;
    Py_DECREF(array);
    return raise_status(status);
}

/* The last workspace, if it is not larger than this, is kept for the next call: to touch fresh
 * pages may cost as much as what is done in them. */
enum { LINE = 64, MOST_SPARE_BYTES = 32 << 20 };

typedef struct block {
    size_t bytes; /* that follow the block's first line */
} block;

static _Atomic(block *) spare;

void *new_work(size_t bytes)
{
    block *found = atomic_exchange(&spare, NULL);
    if (!found || found->bytes < bytes) {
        free(found);
        size_t rounded = bytes > SIZE_MAX - 2 * LINE ? 0 : (bytes + LINE - 1) / LINE * LINE;
        found = rounded < bytes ? NULL : aligned_alloc(LINE, LINE + rounded);
        if (!found)
            return PyErr_NoMemory();
        found->bytes = rounded;
    }
    return (char *)found + LINE;
}

void free_work(void *work)
{
    block *done = work ? (block *)(void *)((char *)work - LINE) : NULL;
    if (done && done->bytes <= MOST_SPARE_BYTES)
        done = atomic_exchange(&spare, done);
    free(done);
}

const fp_kernels *kernels_named(PyObject *module, const char *isa)
{
    if (!isa)
        return state_of(module)->kernels;
    const fp_kernels *kernels = fp_kernels_find(isa);
    if (!kernels)
        PyErr_Format(PyExc_RuntimeError, "kernel variant %s is not available here", isa);
    return kernels;
}

int dtype_of(PyObject *module, PyArrayObject *array, fp_dtype *dtype)
{
    int type = PyArray_TYPE(array);
    if (type == NPY_FLOAT)
        *dtype = FP_F32;
    else if (type == NPY_DOUBLE)
        *dtype = FP_F64;
    else if (type == NPY_HALF)
        *dtype = FP_F16;
    else if (type == state_of(module)->bfloat16->type_num)
        *dtype = FP_BF16;
    else {
        PyErr_Format(PyExc_TypeError,
                     "expected float32, float64, float16 or bfloat16, got an array of %S",
                     (PyObject *)PyArray_DESCR(array));
        return -1;
    }
    return 0;
}

static PyArrayObject *as_array(PyObject *object, const char *what)
{
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a NumPy array, got %s", what,
                     Py_TYPE(object)->tp_name);
        return NULL;
    }
    if (!PyArray_ISNOTSWAPPED((PyArrayObject *)object)) {
        PyErr_Format(PyExc_ValueError, "%s: expected native byte order", what);
        return NULL;
    }
    return (PyArrayObject *)object;
}

PyArrayObject *contiguous(PyObject *object, const char *what)
{
    PyArrayObject *array = as_array(object, what);
    if (array && !PyArray_ISCARRAY_RO(array)) {
        PyErr_Format(PyExc_ValueError, "%s: expected a C-contiguous, aligned array", what);
        return NULL;
    }
    return array;
}

int typed_vector(PyObject *object, int type, const char *what, int allow_none, PyArrayObject **out)
{
    *out = NULL;
    if (allow_none && object == Py_None)
        return 0;
    PyArrayObject *array = contiguous(object, what);
    if (!array)
        return -1;
    if (PyArray_TYPE(array) != type) {
        PyErr_Format(PyExc_TypeError, "%s: wrong dtype %S", what, (PyObject *)PyArray_DESCR(array));
        return -1;
    }
    *out = array;
    return 0;
}

void *data_of(PyObject *object, const char *what, int type, size_t rows, size_t cols)
{
    PyArrayObject *array;
    if (typed_vector(object, type, what, 0, &array))
        return NULL;
    if (PyArray_NDIM(array) != (cols ? 2 : 1) || (size_t)PyArray_DIM(array, 0) != rows ||
        (cols && (size_t)PyArray_DIM(array, 1) != cols)) {
        if (cols)
            PyErr_Format(PyExc_ValueError, "%s: expected shape (%zu, %zu)", what, rows, cols);
        else
            PyErr_Format(PyExc_ValueError, "%s: expected shape (%zu,)", what, rows);
        return NULL;
    }
    return PyArray_DATA(array);
}

PyArrayObject *new_matrix(int type, size_t rows, size_t cols)
{
    npy_intp shape[2] = {(npy_intp)rows, (npy_intp)cols};
    return (PyArrayObject *)PyArray_SimpleNew(cols ? 2 : 1, shape, type);
}

int choice_from(const char *name, const char *what, const char *const *choices, int *choice)
{
    for (int i = 0; choices[i]; i++)
        if (!strcmp(name, choices[i])) {
            *choice = i;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "%s: unknown %s", what, name);
    return -1;
}

int as_count(PyObject *object, void *count)
{
    unsigned long long value = PyLong_AsUnsignedLongLong(object);
    if (PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError))
            PyErr_Format(PyExc_ValueError, "%R is not a count", object);
        return 0;
    }
    *(uint64_t *)count = value;
    return 1;
}

int scored_from(PyObject *module, PyObject *tuple, fp_scored *out)
{
    PyObject *x, *col_scale;
    double scale;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "expected a tuple (x, scale, col_scale)");
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "OdO", &x, &scale, &col_scale))
        return -1;
    PyArrayObject *array = contiguous(x, "x"), *columns;
    if (!array || dtype_of(module, array, &out->dtype) ||
        typed_vector(col_scale, NPY_FLOAT, "col_scale", 1, &columns))
        return -1;
    int ndim = PyArray_NDIM(array);
    out->x = PyArray_DATA(array);
    out->cols = ndim ? (size_t)PyArray_DIM(array, ndim - 1) : 1;
    out->rows = out->cols ? (size_t)PyArray_SIZE(array) / out->cols : 0;
    out->scale = scale;
    out->col_scale = columns ? PyArray_DATA(columns) : NULL;
    if (columns && (size_t)PyArray_SIZE(columns) != out->cols) {
        PyErr_SetString(PyExc_ValueError, "col_scale: expected one number per column");
        return -1;
    }
    return 0;
}

int matrix_from(PyObject *module, PyObject *object, const char *what, int vector, int allow_none,
                fp_matrix *out)
{
    *out = (fp_matrix){0};
    if (allow_none && object == Py_None)
        return 0;
    PyArrayObject *array = as_array(object, what);
    if (!array || dtype_of(module, array, &out->dtype))
        return -1;
    if (PyArray_NDIM(array) != (vector ? 1 : 2)) {
        PyErr_Format(PyExc_ValueError, "%s: expected %d dimension(s), got %d", what, vector ? 1 : 2,
                     PyArray_NDIM(array));
        return -1;
    }
    out->data = PyArray_DATA(array);
    out->rows = (size_t)PyArray_DIM(array, 0);
    out->cols = vector ? 1 : (size_t)PyArray_DIM(array, 1);
    out->row_stride = PyArray_STRIDE(array, 0);
    out->col_stride = vector ? 0 : PyArray_STRIDE(array, 1);
    return 0;
}
