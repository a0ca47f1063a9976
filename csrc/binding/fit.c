/* FPP with update: the OBS sweep, least squares, damage. */
#include "binding.h"

/* As raise_status, but a factor that does not exist has its own remedy. */
static PyObject *raise_fit(fp_status status)
{
    if (status != FP_ERR_LAPACK)
        return raise_status(status);
    PyErr_SetString(PyExc_ValueError, "h is not positive definite: raise the damping");
    return NULL;
}

/* 0, or -1 with ValueError set. */
static int check_finite(PyArrayObject *array, const char *what, fp_dtype dtype, int threads)
{
    int finite;
    Py_BEGIN_ALLOW_THREADS
    finite = fp_all_finite(PyArray_DATA(array), dtype, (size_t)PyArray_SIZE(array), threads);
    Py_END_ALLOW_THREADS
    if (!finite)
        PyErr_Format(PyExc_ValueError, "%s: has NaN or infinite numbers", what);
    return finite ? 0 : -1;
}

/* A contiguous matrix of finite numbers, of any dtype. */
static int weights_from(PyObject *module, PyObject *object, const char *what, int threads,
                        fp_matrix *out)
{
    PyArrayObject *array = contiguous(object, what);
    if (!array || matrix_from(module, object, what, 0, 0, out))
        return -1;
    return check_finite(array, what, out->dtype, threads);
}

/* data_of, float64 and finite. */
static const double *doubles_of(PyObject *object, const char *what, size_t rows, size_t cols,
                                int threads)
{
    const double *data = data_of(object, what, NPY_DOUBLE, rows, cols);
    return data && check_finite((PyArrayObject *)object, what, FP_F64, threads) ? NULL : data;
}

/* The bits of a matrix. */
static uint8_t *mask_of(PyObject *object, const fp_matrix *w)
{
    return data_of(object, "mask", NPY_UINT8, fp_mask_bytes(w->rows * w->cols), 0);
}

static int not_empty(const fp_matrix *w)
{
    if (w->rows && w->cols)
        return 1;
    PyErr_SetString(PyExc_ValueError, "w: has no elements");
    return 0;
}

/* Two new arrays as a tuple; takes the references. */
static PyObject *pair(PyArrayObject *first, PyObject *second)
{
    PyObject *result = PyTuple_Pack(2, first, second);
    Py_DECREF(first);
    Py_DECREF(second);
    return result;
}

PyObject *py_obs_factor(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"h", "threads", NULL};
    PyObject *object;
    int threads = 1;
    fp_status status = FP_OK;
    (void)module;
    PARSE("O|i", &object, &threads)
    PyArrayObject *array = contiguous(object, "h");
    if (!array)
        return NULL;
    size_t n = PyArray_NDIM(array) ? (size_t)PyArray_DIM(array, 0) : 0;
    if (!n) {
        PyErr_SetString(PyExc_ValueError, "h: expected a square matrix");
        return NULL;
    }
    const double *h = doubles_of(object, "h", n, n, threads);
    if (!h)
        return NULL;
    size_t bytes = fp_obs_factor_work(n);
    void *work = new_work(bytes);
    PyArrayObject *a = work ? new_matrix(NPY_FLOAT, n, n) : NULL;
    PyArrayObject *d = a ? new_matrix(NPY_DOUBLE, n, 0) : NULL;
    if (d) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_obs_factor(h, n, PyArray_DATA(a), PyArray_DATA(d), threads, work, bytes);
        Py_END_ALLOW_THREADS
    }
    free_work(work);
    if (d && !status)
        return pair(a, (PyObject *)d);
    Py_XDECREF(a);
    Py_XDECREF(d);
    return status ? raise_fit(status) : NULL;
}

/* rule and amount as options; 0, or -1 with an exception set. */
static int rule_from(const char *rule, PyObject *amount, fp_obs_options *options)
{
    if (!strcmp(rule, "block") || !strcmp(rule, "row")) {
        options->rule = *rule == 'b' ? FP_OBS_BLOCK : FP_OBS_ROW;
        return as_count(amount, &options->count) ? 0 : -1;
    }
    if (!strcmp(rule, "threshold")) {
        options->rule = FP_OBS_THRESHOLD;
        options->threshold = PyFloat_AsDouble(amount);
        return PyErr_Occurred() ? -1 : 0;
    }
    if (!strcmp(rule, "n:m")) {
        int n, m;
        options->rule = FP_OBS_NM;
        if (!PyTuple_Check(amount) || !PyArg_ParseTuple(amount, "ii", &n, &m)) {
            PyErr_SetString(PyExc_TypeError, "amount: rule n:m takes a tuple (n, m)");
            return -1;
        }
        options->n = n > 0 ? (unsigned)n : 0;
        options->m = m > 0 ? (unsigned)m : 0;
        return 0;
    }
    if (!strcmp(rule, "given")) {
        options->rule = FP_OBS_GIVEN;
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "rule: expected block, row, threshold, n:m or given, got %s",
                 rule);
    return -1;
}

PyObject *py_obs_sweep(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"w",    "a",          "d",   "rule",    "amount", "row_weight",
                            "mask", "block_cols", "out", "threads", NULL};
    PyObject *w_object, *a_object, *d_object, *amount, *weight = Py_None, *mask_object = Py_None;
    const char *rule;
    Py_ssize_t block_cols = 128;
    int with_out = 1, threads = 1;
    fp_obs_options options = {0};
    fp_matrix w;
    fp_status status = FP_OK;
    PARSE("OOOsO|OOnpi", &w_object, &a_object, &d_object, &rule, &amount, &weight, &mask_object,
          &block_cols, &with_out, &threads)
    if (rule_from(rule, amount, &options) || weights_from(module, w_object, "w", threads, &w) ||
        !not_empty(&w))
        return NULL;
    if (block_cols < 1 || (mask_object != Py_None) != (options.rule == FP_OBS_GIVEN)) {
        PyErr_SetString(PyExc_ValueError, block_cols < 1
                                              ? "block_cols: must be positive"
                                              : "mask: rule given needs one, no other takes one");
        return NULL;
    }
    options.block_cols = (size_t)block_cols;
    const float *a = data_of(a_object, "a", NPY_FLOAT, w.cols, w.cols);
    const double *d = a ? doubles_of(d_object, "d", w.cols, 0, threads) : NULL;
    if (!d)
        return NULL;
    if (weight != Py_None) {
        options.row_weight = doubles_of(weight, "row_weight", w.rows, 0, threads);
        if (!options.row_weight)
            return NULL;
    }
    PyArrayObject *mask = NULL, *out = NULL;
    if (options.rule != FP_OBS_GIVEN)
        mask = new_matrix(NPY_UINT8, fp_mask_bytes(w.rows * w.cols), 0);
    else if (mask_of(mask_object, &w))
        mask = (PyArrayObject *)Py_NewRef(mask_object);
    size_t bytes = fp_obs_sweep_work(w.rows, w.cols, &options, threads);
    void *work = mask ? new_work(bytes) : NULL;
    if (work && with_out)
        out = new_matrix(NPY_FLOAT, w.rows, w.cols);
    if (work && (out || !with_out)) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_obs_sweep(&w, a, d, &options, PyArray_DATA(mask),
                              out ? PyArray_DATA(out) : NULL, threads, work, bytes);
        Py_END_ALLOW_THREADS
    }
    free_work(work);
    if (work && !status && (out || !with_out))
        return pair(mask, out ? (PyObject *)out : Py_NewRef(Py_None));
    Py_XDECREF(mask);
    Py_XDECREF(out);
    return status ? raise_fit(status) : NULL;
}

/* refit and swap: with rounds the result is (new mask, weights), without the weights. */
static PyObject *refit(PyObject *module, PyObject *w_object, PyObject *mask_object,
                       PyObject *h_object, PyObject *rhs_object, unsigned rounds, size_t group,
                       int threads)
{
    fp_matrix w;
    fp_status status = FP_OK;
    if (weights_from(module, w_object, "w", threads, &w) || !not_empty(&w))
        return NULL;
    uint8_t *given = mask_of(mask_object, &w);
    const double *h = given ? doubles_of(h_object, "h", w.cols, w.cols, threads) : NULL;
    const double *rhs = NULL;
    if (h && rhs_object != Py_None)
        rhs = doubles_of(rhs_object, "rhs", w.rows, w.cols, threads);
    if (!h || (rhs_object != Py_None && !rhs))
        return NULL;
    fp_dtype out_dtype = w.dtype == FP_F64 ? FP_F64 : FP_F32;
    size_t bytes = fp_refit_work(given, rhs, w.rows, w.cols, rounds, threads);
    void *work = new_work(bytes);
    PyArrayObject *mask = work ? new_matrix(NPY_UINT8, fp_mask_bytes(w.rows * w.cols), 0) : NULL;
    PyArrayObject *out =
        mask ? new_matrix(out_dtype == FP_F64 ? NPY_DOUBLE : NPY_FLOAT, w.rows, w.cols) : NULL;
    if (out) {
        memcpy(PyArray_DATA(mask), given, fp_mask_bytes(w.rows * w.cols));
        Py_BEGIN_ALLOW_THREADS
        status = fp_refit(&w, PyArray_DATA(mask), h, rhs, rounds, group, PyArray_DATA(out),
                          out_dtype, threads, work, bytes);
        Py_END_ALLOW_THREADS
    }
    free_work(work);
    if (out && !status && rounds)
        return pair(mask, (PyObject *)out);
    Py_XDECREF(mask);
    if (out && !status)
        return (PyObject *)out;
    Py_XDECREF(out);
    return status ? raise_fit(status) : NULL;
}

PyObject *py_refit(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"w", "mask", "h", "rhs", "threads", NULL};
    PyObject *w, *mask, *h, *rhs = Py_None;
    int threads = 1;
    PARSE("OOO|Oi", &w, &mask, &h, &rhs, &threads)
    return refit(module, w, mask, h, rhs, 0, 0, threads);
}

PyObject *py_swap(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"w", "mask", "h", "rounds", "group", "rhs", "threads", NULL};
    PyObject *w, *mask, *h, *rhs = Py_None;
    int rounds, threads = 1;
    Py_ssize_t group = 0;
    PARSE("OOOi|nOi", &w, &mask, &h, &rounds, &group, &rhs, &threads)
    if (rounds < 1 || group < 0) {
        PyErr_SetString(PyExc_ValueError,
                        rounds < 1 ? "rounds: must be positive" : "group: must not be negative");
        return NULL;
    }
    return refit(module, w, mask, h, rhs, (unsigned)rounds, (size_t)group, threads);
}

PyObject *py_damage(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"w", "w_new", "c", "threads", NULL};
    PyObject *w_object, *new_object, *c_object;
    int threads = 1;
    fp_matrix w, w_new;
    fp_status status;
    PARSE("OOO|i", &w_object, &new_object, &c_object, &threads)
    if (weights_from(module, w_object, "w", threads, &w) ||
        weights_from(module, new_object, "w_new", threads, &w_new) || !not_empty(&w))
        return NULL;
    const double *c = doubles_of(c_object, "c", w.cols, w.cols, threads);
    if (!c)
        return NULL;
    size_t bytes = fp_damage_work(w.cols, threads);
    void *work = new_work(bytes);
    PyArrayObject *numerator = work ? new_matrix(NPY_DOUBLE, w.rows, 0) : NULL;
    PyArrayObject *denominator = numerator ? new_matrix(NPY_DOUBLE, w.rows, 0) : NULL;
    if (!denominator) {
        free_work(work);
        Py_XDECREF(numerator);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = fp_damage(&w, &w_new, c, PyArray_DATA(numerator), PyArray_DATA(denominator), threads,
                       work, bytes);
    Py_END_ALLOW_THREADS
    free_work(work);
    if (!status)
        return pair(numerator, (PyObject *)denominator);
    Py_DECREF(numerator);
    Py_DECREF(denominator);
    return raise_fit(status);
}
