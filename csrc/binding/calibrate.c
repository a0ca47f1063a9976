/* Calibration: sums over rows of activations, added to arrays in place. */
#include "binding.h"

/* The data of a writable float64 array with ndim dimensions of `size`, or NULL with an exception
 * set. */
static double *sums_from(PyObject *object, const char *what, int ndim, size_t size)
{
    PyArrayObject *array = contiguous(object, what);
    if (!array)
        return NULL;
    int right = PyArray_TYPE(array) == NPY_DOUBLE && PyArray_NDIM(array) == ndim &&
                PyArray_ISWRITEABLE(array);
    for (int i = 0; right && i < ndim; i++)
        right = (size_t)PyArray_DIM(array, i) == size;
    if (!right) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected a writable float64 array of %d dimension(s) of %zu", what, ndim,
                     size);
        return NULL;
    }
    return PyArray_DATA(array);
}

/* n float64 numbers, or NULL for None. */
static int weights_from(PyObject *object, size_t n, const double **weights)
{
    PyArrayObject *array;
    *weights = NULL;
    if (typed_vector(object, NPY_DOUBLE, "weights", 1, &array))
        return -1;
    if (array && (size_t)PyArray_SIZE(array) != n) {
        PyErr_SetString(PyExc_ValueError, "weights: expected one number per row");
        return -1;
    }
    if (array)
        *weights = PyArray_DATA(array);
    return 0;
}

static int rows_from(PyObject *module, PyObject *x, PyObject *object, fp_matrix *rows,
                     const double **weights)
{
    return matrix_from(module, x, "x", 0, 0, rows) || weights_from(object, rows->rows, weights) ? -1
                                                                                                : 0;
}

static PyObject *total_or_raise(const fp_row_total *total, fp_status status)
{
    if (status)
        return raise_status(status);
    return Py_BuildValue("dK", total->weight, (unsigned long long)total->rows);
}

/* The first row that may not be added, -1 if there is none. */
PyObject *py_check_rows(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "weights", "threads", NULL};
    PyObject *x, *object = Py_None;
    int threads = 1;
    fp_matrix rows;
    const double *weights;
    size_t bad = 0;
    fp_status status;
    PARSE("O|Oi", &x, &object, &threads)
    if (rows_from(module, x, object, &rows, &weights))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_rows_check(&rows, weights, &bad, threads);
    Py_END_ALLOW_THREADS
    if (status && status != FP_ERR_VALUE)
        return raise_status(status);
    return PyLong_FromSsize_t(status ? (Py_ssize_t)bad : -1);
}

PyObject *py_moments_update(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "weights", "second", "sum", "threads", NULL};
    PyObject *x, *object, *second_object, *sum_object;
    int threads = 1;
    fp_matrix rows;
    const double *weights;
    double *second, *sum;
    fp_row_total total;
    fp_status status;
    PARSE("OOOO|i", &x, &object, &second_object, &sum_object, &threads)
    if (rows_from(module, x, object, &rows, &weights) ||
        !(second = sums_from(second_object, "second", 2, rows.cols)) ||
        !(sum = sums_from(sum_object, "sum", 1, rows.cols)))
        return NULL;
    size_t bytes = fp_moments_work(&rows);
    if (!bytes)
        return raise_status(FP_ERR_OVERFLOW);
    void *work = new_work(bytes);
    if (!work)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_moments_update(&rows, weights, second, sum, &total, threads, work, bytes);
    Py_END_ALLOW_THREADS
    free_work(work);
    return total_or_raise(&total, status);
}

PyObject *py_square_sums(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "weights", "squares", "threads", NULL};
    PyObject *x, *object, *out;
    int threads = 1;
    fp_matrix rows;
    const double *weights;
    double *squares;
    fp_row_total total;
    fp_status status;
    PARSE("OOO|i", &x, &object, &out, &threads)
    if (rows_from(module, x, object, &rows, &weights) ||
        !(squares = sums_from(out, "squares", 1, rows.cols)))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_square_sums(&rows, weights, squares, &total, threads);
    Py_END_ALLOW_THREADS
    return total_or_raise(&total, status);
}

PyObject *py_count_rows(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "weights", "counts", NULL};
    PyObject *ids_object, *object, *out;
    PyArrayObject *ids, *counts;
    const double *weights;
    double weight;
    fp_status status;
    (void)module;
    PARSE("OOO", &ids_object, &object, &out)
    if (typed_vector(ids_object, NPY_INT64, "ids", 0, &ids) ||
        !(counts = contiguous(out, "counts")))
        return NULL;
    size_t n = (size_t)PyArray_SIZE(ids), rows = (size_t)PyArray_SIZE(counts);
    if (weights_from(object, n, &weights) || !sums_from(out, "counts", 1, rows))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_count_rows(PyArray_DATA(ids), n, weights, PyArray_DATA(counts), rows, &weight);
    Py_END_ALLOW_THREADS
    return status ? raise_status(status) : PyFloat_FromDouble(weight);
}
