/* Packed matrices and their products. */
#include "binding.h"

static int size_from(Py_ssize_t rows, Py_ssize_t cols)
{
    if (rows >= 0 && cols >= 0 && (!cols || rows <= PY_SSIZE_T_MAX / 8 / cols))
        return 0;
    raise_status(FP_ERR_OVERFLOW);
    return -1;
}

/* (rows, cols, mask, offset, values, scale or None); values None where they are not needed.
 * Order and offsets are packed_layout's answer for the mask, or anything may be read and written.
 */
static int packed_from(PyObject *module, PyObject *tuple, fp_packed *p)
{
    Py_ssize_t rows, cols;
    PyObject *mask, *offset, *values, *scale;
    *p = (fp_packed){.dtype = FP_F32};
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError,
                        "expected a tuple (rows, cols, mask, offset, values, scale)");
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "nnOOOO", &rows, &cols, &mask, &offset, &values, &scale) ||
        size_from(rows, cols))
        return -1;
    p->rows = (size_t)rows;
    p->cols = (size_t)cols;
    size_t tiles = fp_packed_tiles(p->rows, p->cols), words = fp_packed_words(p->rows, p->cols);
    if (!(p->mask = data_of(mask, "mask", NPY_UINT64, words, 0)) ||
        !(p->offset = data_of(offset, "offset", NPY_UINT64, tiles + 1, 0)))
        return -1;
    if (values != Py_None) {
        PyArrayObject *array = contiguous(values, "values");
        if (!array)
            return -1;
        if (PyArray_TYPE(array) == NPY_INT8)
            p->dtype = FP_I8;
        else if (dtype_of(module, array, &p->dtype))
            return -1;
        if ((uint64_t)PyArray_SIZE(array) != p->offset[tiles]) {
            raise_status(FP_ERR_CORRUPT);
            return -1;
        }
        p->values = PyArray_DATA(array);
    }
    if (p->dtype == FP_I8 && !(p->scale = data_of(scale, "scale", NPY_FLOAT, p->rows, 0)))
        return -1;
    return 0;
}

/* ---- making -------------------------------------------------------------------------- */

PyObject *py_packed_mask(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"bits", "rows", "cols", "threads", NULL};
    PyObject *object;
    Py_ssize_t rows, cols;
    int threads = 1;
    fp_status status;
    (void)module;
    PARSE("Onn|i", &object, &rows, &cols, &threads)
    if (size_from(rows, cols))
        return NULL;
    size_t m = (size_t)rows, n = (size_t)cols;
    const uint8_t *bits = data_of(object, "bits", NPY_UINT8, fp_mask_bytes(m * n), 0);
    PyArrayObject *mask = bits ? new_matrix(NPY_UINT64, fp_packed_words(m, n), 0) : NULL;
    if (!mask)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_packed_mask(bits, m, n, PyArray_DATA(mask), threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(mask, status);
}

PyObject *py_packed_offsets(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"mask", "rows", "cols", "threads", NULL};
    PyObject *object;
    Py_ssize_t rows, cols;
    int threads = 1;
    fp_status status;
    (void)module;
    PARSE("Onn|i", &object, &rows, &cols, &threads)
    if (size_from(rows, cols))
        return NULL;
    size_t m = (size_t)rows, n = (size_t)cols;
    const uint64_t *mask = data_of(object, "mask", NPY_UINT64, fp_packed_words(m, n), 0);
    PyArrayObject *offset = mask ? new_matrix(NPY_UINT64, fp_packed_tiles(m, n) + 1, 0) : NULL;
    if (!offset)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_packed_offsets(mask, m, n, PyArray_DATA(offset), threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(offset, status);
}

PyObject *py_packed_fill(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"packed", "w", "threads", "isa", NULL};
    PyObject *tuple, *object;
    int threads = 1;
    const char *isa = NULL;
    fp_packed p;
    fp_dtype dtype;
    fp_status status;
    PARSE("OO|iz", &tuple, &object, &threads, &isa)
    const fp_kernels *kernels = kernels_named(module, isa);
    PyArrayObject *w = kernels ? contiguous(object, "w") : NULL;
    if (!w || dtype_of(module, w, &dtype) || packed_from(module, tuple, &p))
        return NULL;
    if ((size_t)PyArray_SIZE(w) != p.rows * p.cols)
        return raise_status(FP_ERR_SHAPE);
    npy_intp shape = (npy_intp)fp_packed_kept(&p);
    PyArray_Descr *descr = PyArray_DESCR(w);
    Py_INCREF(descr); /* PyArray_NewFromDescr takes it */
    PyArrayObject *values =
        (PyArrayObject *)PyArray_NewFromDescr(&PyArray_Type, descr, 1, &shape, NULL, NULL, 0, NULL);
    if (!values)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_packed_fill(kernels, &p, PyArray_DATA(w), (size_t)PyArray_ITEMSIZE(w),
                            PyArray_DATA(values), threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(values, status);
}

PyObject *py_packed_quantise(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"packed", "threads", NULL};
    PyObject *tuple;
    int threads = 1;
    fp_packed p;
    fp_status status;
    PARSE("O|i", &tuple, &threads)
    if (packed_from(module, tuple, &p))
        return NULL;
    PyArrayObject *values = new_matrix(NPY_INT8, fp_packed_kept(&p), 0);
    PyArrayObject *scale = values ? new_matrix(NPY_FLOAT, p.rows, 0) : NULL;
    if (!scale) {
        Py_XDECREF(values);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = fp_packed_quantise(&p, PyArray_DATA(values), PyArray_DATA(scale), threads);
    Py_END_ALLOW_THREADS
    if (!status)
        return Py_BuildValue("NN", values, scale);
    Py_DECREF(scale);
    return array_or_raise(values, status);
}

/* A new (rows x cols) array of what a packed matrix unpacks to, or where its values are not of
 * that type, of the type of its activations. */
static PyArrayObject *new_dense(PyObject *tuple, const fp_packed *p, int activations, size_t rows,
                                size_t cols)
{
    npy_intp shape[2] = {(npy_intp)rows, (npy_intp)cols};
    if (activations || p->dtype == FP_I8)
        return (PyArrayObject *)PyArray_SimpleNew(2, shape,
                                                  p->dtype == FP_F64 ? NPY_DOUBLE : NPY_FLOAT);
    PyArray_Descr *descr = PyArray_DESCR((PyArrayObject *)PyTuple_GET_ITEM(tuple, 4));
    Py_INCREF(descr);
    return (PyArrayObject *)PyArray_NewFromDescr(&PyArray_Type, descr, 2, shape, NULL, NULL, 0,
                                                 NULL);
}

PyObject *py_packed_unpack(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"packed", "threads", "isa", NULL};
    PyObject *tuple;
    int threads = 1;
    const char *isa = NULL;
    fp_packed p;
    fp_status status;
    PARSE("O|iz", &tuple, &threads, &isa)
    const fp_kernels *kernels = kernels_named(module, isa);
    if (!kernels || packed_from(module, tuple, &p))
        return NULL;
    if (!p.values)
        return raise_status(FP_ERR_ARGUMENT);
    PyArrayObject *w = new_dense(tuple, &p, 0, p.rows, p.cols);
    if (!w)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_packed_unpack(kernels, &p, PyArray_DATA(w), threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(w, status);
}

/* ---- lookups ------------------------------------------------------------------------- */

PyObject *py_packed_lookup(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"packed", "ids", "threads", "isa", NULL};
    PyObject *tuple, *object;
    int threads = 1;
    const char *isa = NULL;
    fp_packed p;
    fp_status status;
    PyArrayObject *ids;
    PARSE("OO|iz", &tuple, &object, &threads, &isa)
    const fp_kernels *kernels = kernels_named(module, isa);
    if (!kernels || packed_from(module, tuple, &p) ||
        typed_vector(object, NPY_INT64, "ids", 0, &ids))
        return NULL;
    if (!p.values)
        return raise_status(FP_ERR_ARGUMENT);
    size_t n = (size_t)PyArray_SIZE(ids);
    PyArrayObject *rows = new_dense(tuple, &p, 0, n, p.cols);
    if (!rows)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_packed_lookup(kernels, &p, PyArray_DATA(ids), n, PyArray_DATA(rows), threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(rows, status);
}

/* Activations: contiguous, float or double as the values are, `features` to a token. */
static const void *activations_of(PyObject *object, const char *what, const fp_packed *p,
                                  size_t features, size_t *tokens)
{
    PyArrayObject *array;
    if (typed_vector(object, p->dtype == FP_F64 ? NPY_DOUBLE : NPY_FLOAT, what, 0, &array))
        return NULL;
    if (PyArray_NDIM(array) != 2 || (size_t)PyArray_DIM(array, 1) != features) {
        PyErr_Format(PyExc_ValueError, "%s: expected two dimensions, the last of %zu", what,
                     features);
        return NULL;
    }
    *tokens = (size_t)PyArray_DIM(array, 0);
    return PyArray_DATA(array);
}

PyObject *py_packed_lookup_gradient(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"packed", "ids", "drows", "ignored", "threads", "isa", NULL};
    PyObject *tuple, *object, *drows_object;
    long long ignored = -1;
    int threads = 1;
    const char *isa = NULL;
    size_t n;
    fp_packed p;
    fp_status status;
    PyArrayObject *ids;
    PARSE("OOO|Liz", &tuple, &object, &drows_object, &ignored, &threads, &isa)
    const fp_kernels *kernels = kernels_named(module, isa);
    if (!kernels || packed_from(module, tuple, &p) ||
        typed_vector(object, NPY_INT64, "ids", 0, &ids))
        return NULL;
    const void *drows = activations_of(drows_object, "drows", &p, p.cols, &n);
    if (!drows)
        return NULL;
    if (n != (size_t)PyArray_SIZE(ids))
        return raise_status(FP_ERR_SHAPE);
    PyArrayObject *dvalues =
        new_matrix(p.dtype == FP_F64 ? NPY_DOUBLE : NPY_FLOAT, fp_packed_kept(&p), 0);
    if (!dvalues)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_packed_lookup_gradient(kernels, &p, PyArray_DATA(ids), n, ignored, drows,
                                       PyArray_DATA(dvalues), threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(dvalues, status);
}

/* ---- products ------------------------------------------------------------------------ */

static const char *const methods[] = {"auto", "vector", "sparse", "dense", NULL};
static const char *const products[] = {"forward", "backward", "gradient", NULL};

PyObject *py_matmul(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"packed", "x", "bias", "threads", "method", "isa", NULL};
    PyObject *tuple, *x_object, *bias_object = Py_None;
    int threads = 1;
    const char *isa = NULL, *name = "auto";
    const void *bias = NULL;
    size_t tokens;
    fp_packed p;
    int method;
    fp_status status;
    PARSE("OO|Oisz", &tuple, &x_object, &bias_object, &threads, &name, &isa)
    const fp_kernels *kernels = kernels_named(module, isa);
    if (!kernels || choice_from(name, "method", methods, &method) || packed_from(module, tuple, &p))
        return NULL;
    const void *x = activations_of(x_object, "x", &p, p.cols, &tokens);
    int type = p.dtype == FP_F64 ? NPY_DOUBLE : NPY_FLOAT;
    if (!x || (bias_object != Py_None && !(bias = data_of(bias_object, "bias", type, p.rows, 0))))
        return NULL;
    size_t bytes = fp_matmul_work(&p, tokens, threads);
    PyArrayObject *y = new_dense(tuple, &p, 1, tokens, p.rows);
    void *work = y ? new_work(bytes) : NULL;
    if (!work) {
        Py_XDECREF(y);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = fp_matmul_forward(kernels, &p, x, tokens, bias, PyArray_DATA(y),
                               (fp_matmul_method)method, threads, work, bytes);
    Py_END_ALLOW_THREADS
    free_work(work);
    return array_or_raise(y, status);
}

PyObject *py_matmul_backward(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"packed", "dy", "threads", "method", "isa", NULL};
    PyObject *tuple, *object;
    int method, threads = 1;
    const char *isa = NULL, *name = "auto";
    size_t tokens;
    fp_packed p;
    fp_status status;
    PARSE("OO|isz", &tuple, &object, &threads, &name, &isa)
    const fp_kernels *kernels = kernels_named(module, isa);
    if (!kernels || choice_from(name, "method", methods, &method) || packed_from(module, tuple, &p))
        return NULL;
    const void *dy = activations_of(object, "dy", &p, p.rows, &tokens);
    if (!dy)
        return NULL;
    size_t bytes = fp_matmul_work(&p, tokens, threads);
    PyArrayObject *dx = new_dense(tuple, &p, 1, tokens, p.cols);
    void *work = dx ? new_work(bytes) : NULL;
    if (!work) {
        Py_XDECREF(dx);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = fp_matmul_backward(kernels, &p, dy, tokens, PyArray_DATA(dx), (fp_matmul_method)method,
                                threads, work, bytes);
    Py_END_ALLOW_THREADS
    free_work(work);
    return array_or_raise(dx, status);
}

PyObject *py_matmul_gradient(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"packed", "dy", "x", "threads", "method", "isa", NULL};
    PyObject *tuple, *dy_object, *x_object;
    int method, threads = 1;
    const char *isa = NULL, *name = "auto";
    size_t tokens, x_tokens;
    fp_packed p;
    fp_status status;
    PARSE("OOO|isz", &tuple, &dy_object, &x_object, &threads, &name, &isa)
    const fp_kernels *kernels = kernels_named(module, isa);
    if (!kernels || choice_from(name, "method", methods, &method) || packed_from(module, tuple, &p))
        return NULL;
    const void *dy = activations_of(dy_object, "dy", &p, p.rows, &tokens);
    const void *x = dy ? activations_of(x_object, "x", &p, p.cols, &x_tokens) : NULL;
    if (!x)
        return NULL;
    if (tokens != x_tokens)
        return raise_status(FP_ERR_SHAPE);
    size_t bytes = fp_matmul_work(&p, tokens, threads);
    PyArrayObject *dvalues =
        new_matrix(p.dtype == FP_F64 ? NPY_DOUBLE : NPY_FLOAT, fp_packed_kept(&p), 0);
    void *work = dvalues ? new_work(bytes) : NULL;
    if (!work) {
        Py_XDECREF(dvalues);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = fp_matmul_gradient(kernels, &p, dy, x, tokens, PyArray_DATA(dvalues),
                                (fp_matmul_method)method, threads, work, bytes);
    Py_END_ALLOW_THREADS
    free_work(work);
    return array_or_raise(dvalues, status);
}

PyObject *py_matmul_choice(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"packed", "tokens", "product", NULL};
    PyObject *tuple;
    Py_ssize_t tokens;
    const char *name = "forward";
    fp_packed p;
    int product;
    PARSE("On|s", &tuple, &tokens, &name)
    const fp_kernels *kernels = kernels_named(module, NULL);
    if (!kernels || choice_from(name, "product", products, &product) ||
        packed_from(module, tuple, &p))
        return NULL;
    if (tokens < 0)
        return raise_status(FP_ERR_RANGE);
    return PyUnicode_FromString(
        methods[fp_matmul_choice(kernels, &p, (fp_product)product, (size_t)tokens)]);
}
