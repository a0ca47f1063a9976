/* Scores, selection, masks. */
#include "binding.h"

/* Bits for n elements as a fresh uint8 array. */
static PyArrayObject *new_mask(size_t n)
{
    npy_intp bytes = (npy_intp)fp_mask_bytes(n);
    return (PyArrayObject *)PyArray_ZEROS(1, &bytes, NPY_UINT8, 0);
}

PyObject *py_all_finite(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "threads", NULL};
    PyObject *x;
    int threads = 1, finite;
    fp_dtype dtype;
    PARSE("O|i", &x, &threads)
    PyArrayObject *array = contiguous(x, "x");
    if (!array || dtype_of(module, array, &dtype))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    finite = fp_all_finite(PyArray_DATA(array), dtype, (size_t)PyArray_SIZE(array), threads);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(finite);
}

PyObject *py_energy(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"scored", "threads", NULL};
    PyObject *tuple;
    int threads = 1;
    double energy;
    fp_scored t;
    PARSE("O|i", &tuple, &threads)
    if (scored_from(module, tuple, &t))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    energy = fp_energy(&t, threads);
    Py_END_ALLOW_THREADS
    return PyFloat_FromDouble(energy);
}

/* A list of scored tuples as an array for the core; the list must outlive it. */
static fp_scored *scored_list(PyObject *module, PyObject *list, size_t *count)
{
    if (!PyList_Check(list)) {
        PyErr_SetString(PyExc_TypeError, "expected a list of (x, scale, col_scale)");
        return NULL;
    }
    *count = (size_t)PyList_GET_SIZE(list);
    fp_scored *t = new_work(*count * sizeof *t);
    for (size_t i = 0; t && i < *count; i++) {
        if (scored_from(module, PyList_GET_ITEM(list, (Py_ssize_t)i), &t[i])) {
            free_work(t);
            return NULL;
        }
    }
    return t;
}

PyObject *py_histogram(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"scored", "threads", NULL};
    PyObject *list;
    int threads = 1;
    size_t count;
    fp_status status;
    PARSE("O|i", &list, &threads)
    fp_scored *t = scored_list(module, list, &count);
    if (!t)
        return NULL;
    size_t bytes = fp_select_work(threads);
    void *work = new_work(bytes);
    npy_intp bins = FP_HISTOGRAM_BINS;
    PyArrayObject *out = work ? (PyArrayObject *)PyArray_SimpleNew(1, &bins, NPY_UINT64) : NULL;
    if (out) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_histogram(state_of(module)->kernels, t, count, PyArray_DATA(out), threads, work,
                              bytes);
        Py_END_ALLOW_THREADS
        if (status) {
            Py_CLEAR(out);
            raise_status(status);
        }
    }
    free_work(work);
    free_work(t);
    return (PyObject *)out;
}

PyObject *py_select(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"scored", "k", "threads", "isa", NULL};
    PyObject *list;
    uint64_t k;
    int threads = 1;
    const char *isa = NULL;
    size_t count;
    fp_status status = FP_OK;
    fp_threshold threshold = {0, 0};
    PARSE("OO&|iz", &list, as_count, &k, &threads, &isa)
    const fp_kernels *kernels = kernels_named(module, isa);
    fp_scored *t = kernels ? scored_list(module, list, &count) : NULL;
    if (!t)
        return NULL;
    size_t bytes = fp_select_work(threads);
    void *work = new_work(bytes);
    if (work) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_select(kernels, t, count, k, &threshold, threads, work, bytes);
        Py_END_ALLOW_THREADS
    }
    free_work(t);
    if (!work)
        return NULL;
    free_work(work);
    if (status)
        return raise_status(status);
    return Py_BuildValue("dK", threshold.score, (unsigned long long)threshold.ties);
}

PyObject *py_mask_threshold(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"scored", "score", "ties", "threads", "isa", NULL};
    PyObject *tuple;
    fp_threshold threshold;
    int threads = 1;
    const char *isa = NULL;
    fp_scored t;
    fp_status status = FP_OK;
    uint64_t used = 0;
    PARSE("OdO&|iz", &tuple, &threshold.score, as_count, &threshold.ties, &threads, &isa)
    const fp_kernels *kernels = kernels_named(module, isa);
    if (!kernels || scored_from(module, tuple, &t))
        return NULL;
    size_t bytes = fp_mask_work(&t);
    void *work = new_work(bytes);
    PyArrayObject *mask = work ? new_mask(t.rows * t.cols) : NULL;
    if (mask) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_mask_threshold(kernels, &t, threshold, PyArray_DATA(mask), &used, threads, work,
                                   bytes);
        Py_END_ALLOW_THREADS
    }
    free_work(work);
    if (!mask)
        return NULL;
    if (status) {
        Py_DECREF(mask);
        return raise_status(status);
    }
    return Py_BuildValue("NK", mask, (unsigned long long)used);
}

PyObject *py_mask_rows(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"scored", "k", "threads", NULL};
    PyObject *tuple;
    uint64_t k;
    int threads = 1;
    fp_scored t;
    fp_status status = FP_OK;
    PARSE("OO&|i", &tuple, as_count, &k, &threads)
    if (scored_from(module, tuple, &t))
        return NULL;
    size_t bytes = fp_mask_rows_work(&t, threads);
    void *work = new_work(bytes);
    PyArrayObject *mask = work ? new_mask(t.rows * t.cols) : NULL;
    if (mask) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_mask_rows(&t, (size_t)k, PyArray_DATA(mask), threads, work, bytes);
        Py_END_ALLOW_THREADS
    }
    free_work(work);
    return mask ? array_or_raise(mask, status) : NULL;
}

PyObject *py_mask_nm(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"scored", "n", "m", "threads", NULL};
    PyObject *tuple;
    unsigned n, m;
    int threads = 1;
    fp_scored t;
    fp_status status;
    PARSE("OII|i", &tuple, &n, &m, &threads)
    if (scored_from(module, tuple, &t))
        return NULL;
    PyArrayObject *mask = new_mask(t.rows * t.cols);
    if (!mask)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_mask_nm(&t, n, m, PyArray_DATA(mask), threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(mask, status);
}

PyObject *py_block_scores(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"scored", "block_rows", "block_cols", "threads", NULL};
    PyObject *tuple;
    Py_ssize_t block_rows, block_cols;
    int threads = 1;
    fp_scored t;
    fp_status status;
    PARSE("Onn|i", &tuple, &block_rows, &block_cols, &threads)
    if (scored_from(module, tuple, &t))
        return NULL;
    if (block_rows < 1 || block_cols < 1)
        return raise_status(FP_ERR_RANGE);
    npy_intp shape[2] = {(npy_intp)t.rows / block_rows + (t.rows % (size_t)block_rows != 0),
                         (npy_intp)t.cols / block_cols + (t.cols % (size_t)block_cols != 0)};
    PyArrayObject *scores = (PyArrayObject *)PyArray_SimpleNew(2, shape, NPY_FLOAT);
    if (!scores)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status =
        fp_block_scores(&t, (size_t)block_rows, (size_t)block_cols, PyArray_DATA(scores), threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(scores, status);
}

PyObject *py_mask_blocks(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"block_mask", "rows",    "cols", "block_rows",
                            "block_cols", "threads", NULL};
    PyObject *object;
    Py_ssize_t rows, cols, block_rows, block_cols;
    int threads = 1;
    PyArrayObject *blocks;
    fp_status status;
    (void)module;
    PARSE("Onnnn|i", &object, &rows, &cols, &block_rows, &block_cols, &threads)
    if (typed_vector(object, NPY_UINT8, "block_mask", 0, &blocks))
        return NULL;
    if (rows < 0 || cols < 0 || block_rows < 1 || block_cols < 1)
        return raise_status(FP_ERR_RANGE);
    if (cols && rows > PY_SSIZE_T_MAX / cols)
        return raise_status(FP_ERR_OVERFLOW);
    size_t grid_rows = (size_t)(rows / block_rows + (rows % block_rows != 0));
    size_t grid_cols = (size_t)(cols / block_cols + (cols % block_cols != 0));
    if ((size_t)PyArray_SIZE(blocks) != fp_mask_bytes(grid_rows * grid_cols))
        return raise_status(FP_ERR_CORRUPT);
    PyArrayObject *mask = new_mask((size_t)rows * (size_t)cols);
    if (!mask)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_mask_blocks(PyArray_DATA(blocks), (size_t)rows, (size_t)cols, (size_t)block_rows,
                            (size_t)block_cols, PyArray_DATA(mask), threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(mask, status);
}
