/* Folds. Every function takes the heads as (left, left_bias, right, right_extra, heads, groups) and
 * optionally left_scale and right_scale (float64 vectors or None), left_factor and right_factor
 * (square float64 arrays or None). */
#include "binding.h"

/* A square C-contiguous float64 array of `size` columns; None gives NULL. */
static int factor_from(PyObject *object, const char *what, size_t size, const double **factor)
{
    *factor = NULL;
    if (object == Py_None)
        return 0;
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_Check(object) || PyArray_TYPE(array) != NPY_DOUBLE ||
        !PyArray_IS_C_CONTIGUOUS(array) || !PyArray_ISBEHAVED_RO(array)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a C-contiguous float64 array", what);
        return -1;
    }
    if (PyArray_NDIM(array) != 2 || (size_t)PyArray_DIM(array, 0) != size ||
        (size_t)PyArray_DIM(array, 1) != size) {
        PyErr_Format(PyExc_ValueError, "%s: expected %zu x %zu numbers", what, size, size);
        return -1;
    }
    *factor = PyArray_DATA(array);
    return 0;
}

static int heads_from(PyObject *module, PyObject *tuple, fp_heads *h)
{
    PyObject *left, *left_bias, *right, *right_extra;
    PyObject *left_scale = Py_None, *right_scale = Py_None;
    PyObject *left_factor = Py_None, *right_factor = Py_None;
    PyArrayObject *scales[2];
    Py_ssize_t heads, groups;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "expected a tuple of heads");
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "OOOOnn|OOOO", &left, &left_bias, &right, &right_extra, &heads,
                          &groups, &left_scale, &right_scale, &left_factor, &right_factor))
        return -1;
    if (matrix_from(module, left, "left", 0, 0, &h->left) ||
        matrix_from(module, left_bias, "left_bias", 1, 1, &h->left_bias) ||
        matrix_from(module, right, "right", 0, 0, &h->right) ||
        matrix_from(module, right_extra, "right_extra", 1, 1, &h->right_extra) ||
        typed_vector(left_scale, NPY_DOUBLE, "left_scale", 1, &scales[0]) ||
        typed_vector(right_scale, NPY_DOUBLE, "right_scale", 1, &scales[1]) ||
        factor_from(left_factor, "left_factor", h->left.cols + (h->left_bias.data != NULL),
                    &h->left_factor) ||
        factor_from(right_factor, "right_factor", h->right.cols, &h->right_factor))
        return -1;
    if ((scales[0] && (size_t)PyArray_SIZE(scales[0]) != h->left.cols) ||
        (scales[1] && (size_t)PyArray_SIZE(scales[1]) != h->right.cols)) {
        PyErr_SetString(PyExc_ValueError, "scales: expected one number per column");
        return -1;
    }
    h->left_scale = scales[0] ? PyArray_DATA(scales[0]) : NULL;
    h->right_scale = scales[1] ? PyArray_DATA(scales[1]) : NULL;
    if (heads < 1 || groups < 1 || heads % groups || h->left.rows % (size_t)heads ||
        !h->left.rows || h->right.rows != h->left.rows / (size_t)heads * (size_t)groups) {
        raise_status(FP_ERR_SHAPE);
        return -1;
    }
    h->heads = (size_t)heads;
    h->groups = (size_t)groups;
    h->head_dim = h->left.rows / (size_t)heads;
    return 0;
}

static PyArrayObject *new_array(int type, int ndim, size_t a, size_t b, size_t c, size_t d)
{
    npy_intp shape[4] = {(npy_intp)a, (npy_intp)b, (npy_intp)c, (npy_intp)d};
    return (PyArrayObject *)PyArray_ZEROS(ndim, shape, type, 0);
}

#define DATA(array) ((array) ? PyArray_DATA(array) : NULL)

/* What one call allocates. */
typedef struct call {
    fp_heads h;
    size_t n, de;
    PyArrayObject *left, *right, *pivots, *ranks, *error, *energy;
    fp_fold_out out;
    void *work;
    size_t work_bytes;
} call;

static void call_clear(call *c)
{
    Py_CLEAR(c->left);
    Py_CLEAR(c->right);
    Py_CLEAR(c->pivots);
    Py_CLEAR(c->ranks);
    Py_CLEAR(c->error);
    Py_CLEAR(c->energy);
    free_work(c->work);
    c->work = NULL;
}

static int call_begin(PyObject *module, PyObject *tuple, int threads, call *c)
{
    *c = (call){0};
    if (heads_from(module, tuple, &c->h))
        return -1;
    c->n = c->h.left.cols + (c->h.left_bias.data != NULL);
    c->de = c->h.right.cols + (c->h.right_extra.data != NULL);
    c->work_bytes = fp_fold_work(&c->h, threads);
    if (!c->work_bytes) {
        raise_status(FP_ERR_OVERFLOW);
        return -1;
    }
    return (c->work = new_work(c->work_bytes)) ? 0 : -1;
}

/* rows: 1, or 2 for planes. */
static int call_outputs(call *c, size_t capacity, size_t rows, int gauge)
{
    size_t g = c->h.groups;
    c->left = rows == 1 ? new_array(NPY_DOUBLE, 3, c->h.heads, capacity, c->n, 0)
                        : new_array(NPY_DOUBLE, 4, c->h.heads, capacity, rows, c->n);
    c->right = rows == 1 ? new_array(NPY_DOUBLE, 3, g, capacity, c->de, 0)
                         : new_array(NPY_DOUBLE, 4, g, capacity, rows, c->de);
    c->pivots = gauge ? new_array(NPY_INT32, 2, g, capacity, 0, 0) : NULL;
    c->ranks = new_array(NPY_INT32, 1, g, 0, 0, 0);
    c->error = new_array(NPY_DOUBLE, 1, g, 0, 0, 0);
    c->energy = new_array(NPY_DOUBLE, 1, g, 0, 0, 0);
    if (!c->left || !c->right || (gauge && !c->pivots) || !c->ranks || !c->error || !c->energy)
        return -1;
    c->out = (fp_fold_out){.left = PyArray_DATA(c->left),
                           .right = PyArray_DATA(c->right),
                           .pivots = DATA(c->pivots),
                           .ranks = PyArray_DATA(c->ranks),
                           .error = PyArray_DATA(c->error),
                           .energy = PyArray_DATA(c->energy),
                           .capacity = capacity};
    return 0;
}

/* (left, right, pivots or None, ranks, error, energy) + extras, or an exception; clears c. */
static PyObject *call_end(call *c, fp_status status, PyArrayObject *first, PyArrayObject *second)
{
    PyObject *result = NULL, *none = Py_None;
    if (status)
        raise_status(status);
    else if (!first)
        result =
            Py_BuildValue("OOOOOO", c->left, c->right, c->pivots ? (PyObject *)c->pivots : none,
                          c->ranks, c->error, c->energy);
    else if (!second)
        result =
            Py_BuildValue("OOOOOOO", c->left, c->right, c->pivots ? (PyObject *)c->pivots : none,
                          c->ranks, c->error, c->energy, first);
    else
        result =
            Py_BuildValue("OOOOOOOO", c->left, c->right, c->pivots ? (PyObject *)c->pivots : none,
                          c->ranks, c->error, c->energy, first, second);
    call_clear(c);
    return result;
}

/* One int32 per group. */
static int ranks_from(PyObject *object, const call *c, const int32_t **ranks, int allow_none)
{
    PyArrayObject *array;
    *ranks = NULL;
    if (typed_vector(object, NPY_INT32, "ranks", allow_none, &array))
        return -1;
    if (array && (size_t)PyArray_SIZE(array) != c->h.groups) {
        PyErr_SetString(PyExc_ValueError, "ranks: expected one number per group");
        return -1;
    }
    *ranks = DATA(array);
    return 0;
}

static size_t largest(const int32_t *ranks, size_t count, size_t otherwise)
{
    size_t most = ranks ? 0 : otherwise;
    for (size_t i = 0; ranks && i < count; i++)
        if (ranks[i] > 0 && (size_t)ranks[i] > most)
            most = (size_t)ranks[i];
    return most ? most : 1;
}

PyObject *py_irc_spectrum(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"heads", "threads", NULL};
    PyObject *tuple;
    int threads = 1;
    fp_status status;
    call c;
    PARSE("O|i", &tuple, &threads)
    if (call_begin(module, tuple, threads, &c))
        return NULL;
    PyArrayObject *squared = new_array(NPY_DOUBLE, 2, c.h.groups, c.h.head_dim, 0, 0);
    if (squared) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_irc_spectrum(&c.h, PyArray_DATA(squared), threads, c.work, c.work_bytes);
        Py_END_ALLOW_THREADS
        if (status) {
            Py_CLEAR(squared);
            raise_status(status);
        }
    }
    call_clear(&c);
    return (PyObject *)squared;
}

PyObject *py_irc(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"heads", "ranks", "gauge", "threads", NULL};
    PyObject *tuple, *ranks_object;
    int gauge, threads = 1;
    const int32_t *ranks;
    fp_status status;
    call c;
    PARSE("OOp|i", &tuple, &ranks_object, &gauge, &threads)
    if (call_begin(module, tuple, threads, &c) || ranks_from(ranks_object, &c, &ranks, 1) ||
        call_outputs(&c, largest(ranks, c.h.groups, c.h.head_dim), 1, gauge)) {
        call_clear(&c);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = fp_irc_apply(&c.h, ranks, &c.out, threads, c.work, c.work_bytes);
    Py_END_ALLOW_THREADS
    return call_end(&c, status, NULL, NULL);
}

PyObject *py_dwc_spectrum(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"heads", "threads", NULL};
    PyObject *tuple;
    int threads = 1;
    fp_status status = FP_OK;
    call c;
    PARSE("O|i", &tuple, &threads)
    if (call_begin(module, tuple, threads, &c))
        return NULL;
    PyArrayObject *squared = new_array(NPY_DOUBLE, 2, c.h.groups, c.h.head_dim, 0, 0);
    PyArrayObject *energy = new_array(NPY_DOUBLE, 1, c.h.groups, 0, 0, 0);
    PyObject *result = NULL;
    if (squared && energy) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_dwc_spectrum(&c.h, PyArray_DATA(squared), PyArray_DATA(energy), threads, c.work,
                                 c.work_bytes);
        Py_END_ALLOW_THREADS
        result = status ? raise_status(status) : Py_BuildValue("OO", squared, energy);
    }
    Py_XDECREF(squared);
    Py_XDECREF(energy);
    call_clear(&c);
    return result;
}

PyObject *py_dwc_select(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"heads", "columns", "count", "threads", NULL};
    PyObject *tuple, *columns_object;
    Py_ssize_t count;
    int threads = 1;
    PyArrayObject *columns;
    fp_status status;
    call c;
    PARSE("OOn|i", &tuple, &columns_object, &count, &threads)
    if (call_begin(module, tuple, threads, &c))
        return NULL;
    if (typed_vector(columns_object, NPY_INT32, "columns", 1, &columns))
        goto fail;
    if (count < 1 || (columns && (size_t)PyArray_SIZE(columns) != c.h.groups * (size_t)count)) {
        raise_status(FP_ERR_SHAPE);
        goto fail;
    }
    if (call_outputs(&c, (size_t)count, 1, 1))
        goto fail;
    Py_BEGIN_ALLOW_THREADS
    status = fp_dwc_select(&c.h, DATA(columns), &c.out, threads, c.work, c.work_bytes);
    Py_END_ALLOW_THREADS
    return call_end(&c, status, NULL, NULL);
fail:
    call_clear(&c);
    return NULL;
}

PyObject *py_dwc_remainder(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"heads", "ranks", "threads", NULL};
    PyObject *tuple, *ranks_object, *result = NULL;
    int threads = 1;
    const int32_t *ranks;
    fp_status status;
    call c;
    PARSE("OO|i", &tuple, &ranks_object, &threads)
    if (call_begin(module, tuple, threads, &c) || ranks_from(ranks_object, &c, &ranks, 0) ||
        call_outputs(&c, c.h.head_dim, 1, 1)) {
        call_clear(&c);
        return NULL;
    }
    PyArrayObject *a = new_array(NPY_DOUBLE, 3, c.h.groups, c.h.head_dim, c.h.head_dim, 0);
    PyArrayObject *b = new_array(NPY_DOUBLE, 3, c.h.groups, c.h.head_dim, c.h.right.cols, 0);
    if (a && b) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_dwc_remainder(&c.h, ranks, &c.out, PyArray_DATA(a), PyArray_DATA(b), threads,
                                  c.work, c.work_bytes);
        Py_END_ALLOW_THREADS
        result = call_end(&c, status, a, b);
    } else {
        call_clear(&c);
    }
    Py_XDECREF(a);
    Py_XDECREF(b);
    return result;
}

PyObject *py_rope_scores(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"heads", "adjacent", "threads", NULL};
    PyObject *tuple;
    int adjacent, threads = 1;
    fp_heads h;
    fp_status status;
    PARSE("Op|i", &tuple, &adjacent, &threads)
    if (heads_from(module, tuple, &h))
        return NULL;
    PyArrayObject *scores = new_array(NPY_DOUBLE, 2, h.groups, h.head_dim / 2, 0, 0);
    if (!scores)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_rope_scores(&h, adjacent ? FP_ROPE_ADJACENT : FP_ROPE_HALF, PyArray_DATA(scores),
                            threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(scores, status);
}

PyObject *py_rope(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"heads", "adjacent", "scores", "ranks", "gauge", "threads", NULL};
    PyObject *tuple, *scores_object, *ranks_object, *result;
    int adjacent, gauge, threads = 1;
    const int32_t *ranks;
    PyArrayObject *scores, *planes;
    fp_status status;
    call c;
    PARSE("OpOOp|i", &tuple, &adjacent, &scores_object, &ranks_object, &gauge, &threads)
    if (call_begin(module, tuple, threads, &c))
        return NULL;
    if (typed_vector(scores_object, NPY_DOUBLE, "scores", 0, &scores) ||
        ranks_from(ranks_object, &c, &ranks, 1))
        goto fail;
    if ((size_t)PyArray_SIZE(scores) != c.h.groups * (c.h.head_dim / 2)) {
        raise_status(FP_ERR_SHAPE);
        goto fail;
    }
    size_t capacity = largest(ranks, c.h.groups, c.h.head_dim / 2);
    if (call_outputs(&c, capacity, 2, gauge) ||
        !(planes = new_array(NPY_INT32, 2, c.h.groups, capacity, 0, 0)))
        goto fail;
    Py_BEGIN_ALLOW_THREADS
    status = fp_rope_apply(&c.h, adjacent ? FP_ROPE_ADJACENT : FP_ROPE_HALF, PyArray_DATA(scores),
                           ranks, PyArray_DATA(planes), &c.out, threads);
    Py_END_ALLOW_THREADS
    result = call_end(&c, status, planes, NULL);
    Py_DECREF(planes);
    return result;
fail:
    call_clear(&c);
    return NULL;
}
