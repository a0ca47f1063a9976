/* Attention over folded heads. */
#include "binding.h"

#include "foldprune_attention.h"

/* A (batch x heads x rows x columns) view whose columns are contiguous; -1 with an exception set
 * if the array is anything else. Lengths of 1 and 0 have no stride of their
 * own. */
static int rows_from(PyArrayObject *array, const char *what, const npy_intp shape[4], int type,
                     fp_rows *out)
{
    npy_intp item = PyArray_ITEMSIZE(array);
    if (PyArray_TYPE(array) != type || !PyArray_ISALIGNED(array) || !PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected an aligned array of q's dtype, which is float32 "
                     "or float64",
                     what);
        return -1;
    }
    if (PyArray_NDIM(array) != 4 || !PyArray_CompareLists(PyArray_DIMS(array), shape, 4)) {
        PyErr_Format(PyExc_ValueError, "%s: expected shape (%zd, %zd, %zd, %zd)", what, shape[0],
                     shape[1], shape[2], shape[3]);
        return -1;
    }
    if (!PyArray_SIZE(array)) {
        *out = (fp_rows){PyArray_DATA(array), 0, 0, shape[3]};
        return 0;
    }
    npy_intp row = shape[2] > 1 ? PyArray_STRIDE(array, 2) : shape[3] * item;
    if ((shape[3] > 1 && PyArray_STRIDE(array, 3) != item) || row % item || row < shape[3] * item ||
        PyArray_STRIDE(array, 0) % item || PyArray_STRIDE(array, 1) % item) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected contiguous columns in rows that do not overlap", what);
        return -1;
    }
    *out = (fp_rows){PyArray_DATA(array), PyArray_STRIDE(array, 0) / item,
                     PyArray_STRIDE(array, 1) / item, row / item};
    return 0;
}

static PyArrayObject *array_from(PyObject *object, const char *what)
{
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a NumPy array, got %s", what,
                     Py_TYPE(object)->tp_name);
        return NULL;
    }
    return (PyArrayObject *)object;
}

/* Sizes from q, k and v; nothing is copied. */
static int problem_from(PyObject *const objects[3], PyObject *mask, fp_attention *a, int *type)
{
    PyArrayObject *q = array_from(objects[0], "q"), *k = q ? array_from(objects[1], "k") : NULL;
    PyArrayObject *v = k ? array_from(objects[2], "v") : NULL, *key_mask;
    if (!v)
        return -1;
    *type = PyArray_TYPE(q);
    if (*type != NPY_FLOAT && *type != NPY_DOUBLE) {
        PyErr_SetString(PyExc_TypeError, "q: expected float32 or float64");
        return -1;
    }
    if (PyArray_NDIM(q) != 4 || PyArray_NDIM(k) != 4 || PyArray_NDIM(v) != 4) {
        PyErr_SetString(PyExc_ValueError, "q, k, v: expected four dimensions");
        return -1;
    }
    const npy_intp *qs = PyArray_DIMS(q), *ks = PyArray_DIMS(k), *vs = PyArray_DIMS(v);
    const npy_intp k_shape[4] = {qs[0], ks[1], ks[2], qs[3]};
    const npy_intp v_shape[4] = {qs[0], ks[1], ks[2], vs[3]};
    a->dtype = *type == NPY_FLOAT ? FP_F32 : FP_F64;
    a->batch = (size_t)qs[0];
    a->heads = (size_t)qs[1];
    a->n = (size_t)qs[2];
    a->rank = (size_t)qs[3];
    a->kv_heads = (size_t)ks[1];
    a->m = (size_t)ks[2];
    a->value_dim = (size_t)vs[3];
    if (rows_from(q, "q", qs, *type, &a->q) || rows_from(k, "k", k_shape, *type, &a->k) ||
        rows_from(v, "v", v_shape, *type, &a->v) ||
        typed_vector(mask, NPY_BOOL, "key_mask", 1, &key_mask))
        return -1;
    if (key_mask && (PyArray_NDIM(key_mask) != 2 || PyArray_DIM(key_mask, 0) != qs[0] ||
                     PyArray_DIM(key_mask, 1) != ks[2])) {
        PyErr_SetString(PyExc_ValueError, "key_mask: expected shape (batch, keys)");
        return -1;
    }
    a->key_mask = key_mask ? PyArray_DATA(key_mask) : NULL;
    return 0;
}

/* A fresh array of this shape, in memory (batch x rows x heads x columns), so that joining the
 * heads needs no copy. */
static PyArrayObject *new_rows(size_t batch, size_t heads, size_t rows, size_t columns, int type,
                               fp_rows *out)
{
    npy_intp shape[4] = {(npy_intp)batch, (npy_intp)rows, (npy_intp)heads, (npy_intp)columns};
    PyArrayObject *base = (PyArrayObject *)PyArray_SimpleNew(4, shape, type);
    if (!base)
        return NULL;
    ptrdiff_t step = (ptrdiff_t)columns, row = heads ? (ptrdiff_t)heads * step : step;
    *out = (fp_rows){PyArray_DATA(base), (ptrdiff_t)rows * row, step, row};
    PyArrayObject *view = (PyArrayObject *)PyArray_SwapAxes(base, 1, 2);
    Py_DECREF(base);
    return view;
}

static const char *const methods[] = {"auto", "exact", "nodes", NULL};

PyObject *py_attention(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"q",   "k",       "v",   "scale",   "causal", "key_mask", "method",
                            "tol", "threads", "isa", "dropout", "seed",   NULL};
    PyObject *objects[3], *mask = Py_None;
    fp_attention a = {.scale = 1.0, .tol = 1e-6};
    int type, method, threads = 1;
    const char *isa = NULL, *name = "auto";
    fp_rows rows;
    fp_status status = FP_ERR_ARGUMENT;
    unsigned long long seed = 0;
    PARSE("OOO|dpOsdizdK", &objects[0], &objects[1], &objects[2], &a.scale, &a.causal, &mask, &name,
          &a.tol, &threads, &isa, &a.dropout, &seed)
    a.seed = seed;
    const fp_kernels *kernels = kernels_named(module, isa);
    if (!kernels || problem_from(objects, mask, &a, &type) ||
        choice_from(name, "method", methods, &method))
        return NULL;
    a.method = (fp_attention_method)method;
    npy_intp lse_shape[3] = {(npy_intp)a.batch, (npy_intp)a.heads, (npy_intp)a.n};
    npy_intp nodes_shape[2] = {(npy_intp)a.batch, (npy_intp)a.kv_heads};
    size_t bytes = fp_attention_work(&a, threads);
    PyArrayObject *out = new_rows(a.batch, a.heads, a.n, a.value_dim, type, &rows);
    PyArrayObject *lse = out ? (PyArrayObject *)PyArray_SimpleNew(3, lse_shape, NPY_DOUBLE) : NULL;
    PyArrayObject *nodes =
        lse ? (PyArrayObject *)PyArray_SimpleNew(2, nodes_shape, NPY_INT32) : NULL;
    void *work = nodes ? new_work(bytes) : NULL;
    if (work) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_attention_forward(kernels, &a, rows, PyArray_DATA(lse), PyArray_DATA(nodes),
                                      threads, work, bytes);
        Py_END_ALLOW_THREADS
        free_work(work);
        if (!status)
            return Py_BuildValue("NNN", out, lse, nodes);
        raise_status(status);
    }
    Py_XDECREF(out);
    Py_XDECREF(lse);
    Py_XDECREF(nodes);
    return NULL;
}

/* dout and out as rows like q's, lse and nodes as arrays of these types. */
static int results_from(PyObject *const objects[4], const fp_attention *a, int type, fp_rows *dout,
                        fp_rows *out, PyArrayObject **lse, PyArrayObject **nodes)
{
    const npy_intp shape[4] = {(npy_intp)a->batch, (npy_intp)a->heads, (npy_intp)a->n,
                               (npy_intp)a->value_dim};
    PyArrayObject *first = array_from(objects[0], "dout");
    PyArrayObject *second = first ? array_from(objects[1], "out") : NULL;
    if (!second || rows_from(first, "dout", shape, type, dout) ||
        rows_from(second, "out", shape, type, out) ||
        typed_vector(objects[2], NPY_DOUBLE, "lse", 0, lse) ||
        typed_vector(objects[3], NPY_INT32, "nodes", 0, nodes))
        return -1;
    if ((size_t)PyArray_SIZE(*lse) != a->batch * a->heads * a->n ||
        (size_t)PyArray_SIZE(*nodes) != a->batch * a->kv_heads) {
        PyErr_SetString(PyExc_ValueError, "lse, nodes: expected what attention returned");
        return -1;
    }
    return 0;
}

PyObject *py_attention_backward(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"dout",    "q",     "k",       "v",      "out",
                            "lse",     "nodes", "scale",   "causal", "key_mask",
                            "threads", "isa",   "dropout", "seed",   NULL};
    PyObject *inputs[3], *results[4], *mask = Py_None;
    fp_attention a = {.scale = 1.0, .tol = 1, .method = FP_ATTENTION_EXACT};
    int type, threads = 1;
    const char *isa = NULL;
    fp_rows out, dout, dq, dk, dv;
    PyArrayObject *lse, *nodes, *gradients[3] = {NULL, NULL, NULL};
    fp_status status = FP_ERR_ARGUMENT;
    unsigned long long seed = 0;
    PARSE("OOOOOOO|dpOizdK", &results[0], &inputs[0], &inputs[1], &inputs[2], &results[1],
          &results[2], &results[3], &a.scale, &a.causal, &mask, &threads, &isa, &a.dropout, &seed)
    a.seed = seed;
    const fp_kernels *kernels = kernels_named(module, isa);
    if (!kernels || problem_from(inputs, mask, &a, &type) ||
        results_from(results, &a, type, &dout, &out, &lse, &nodes))
        return NULL;
    const int32_t *used = PyArray_DATA(nodes);
    for (size_t i = 0; i < a.batch * a.kv_heads && a.rank == 1; i++)
        if (used[i])
            a.method = FP_ATTENTION_NODES;
    size_t bytes = fp_attention_backward_work(&a, threads);
    gradients[0] = new_rows(a.batch, a.heads, a.n, a.rank, type, &dq);
    gradients[1] = gradients[0] ? new_rows(a.batch, a.kv_heads, a.m, a.rank, type, &dk) : NULL;
    gradients[2] = gradients[1] ? new_rows(a.batch, a.kv_heads, a.m, a.value_dim, type, &dv) : NULL;
    void *work = gradients[2] ? new_work(bytes) : NULL;
    if (work) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_attention_backward(kernels, &a, out, PyArray_DATA(lse), used, dout, dq, dk, dv,
                                       threads, work, bytes);
        Py_END_ALLOW_THREADS
        free_work(work);
        if (!status)
            return Py_BuildValue("NNN", gradients[0], gradients[1], gradients[2]);
        raise_status(status);
    }
    for (int i = 0; i < 3; i++)
        Py_XDECREF(gradients[i]);
    return NULL;
}

/* The arrays of a state for `heads` key/value heads; all are written to but the first two. */
static int state_from(PyObject *tuple, size_t heads, size_t dim, fp_nodes_state *state)
{
    static const char *const what[] = {"low", "high",      "key_range", "size",
                                       "sum", "reference", "out"};
    PyArrayObject *arrays[7];
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 7) {
        PyErr_SetString(PyExc_TypeError, "state: expected a tuple of seven arrays");
        return -1;
    }
    for (int i = 0; i < 7; i++)
        if (typed_vector(PyTuple_GET_ITEM(tuple, i), NPY_DOUBLE, what[i], 0, &arrays[i]))
            return -1;
    size_t nodes = heads ? (size_t)PyArray_SIZE(arrays[4]) / heads : 0;
    const size_t sizes[] = {heads,         heads,         2 * heads,          heads,
                            heads * nodes, heads * nodes, heads * nodes * dim};
    for (int i = 0; i < 7; i++) {
        if ((size_t)PyArray_SIZE(arrays[i]) != sizes[i] ||
            (i > 1 && !PyArray_ISWRITEABLE(arrays[i]))) {
            PyErr_Format(PyExc_ValueError, "%s: wrong size, or read-only", what[i]);
            return -1;
        }
    }
    *state = (fp_nodes_state){nodes,
                              PyArray_DATA(arrays[0]),
                              PyArray_DATA(arrays[1]),
                              PyArray_DATA(arrays[2]),
                              PyArray_DATA(arrays[3]),
                              PyArray_DATA(arrays[4]),
                              PyArray_DATA(arrays[5]),
                              PyArray_DATA(arrays[6])};
    return 0;
}

PyObject *py_nodes_append(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"state", "k", "v", "key_mask", "threads", "isa", NULL};
    PyObject *tuple, *objects[3], *mask = Py_None;
    fp_attention a = {.scale = 1.0, .tol = 1};
    fp_nodes_state state;
    int type, threads = 1;
    const char *isa = NULL;
    fp_status status;
    PARSE("OOO|Oiz", &tuple, &objects[1], &objects[2], &mask, &threads, &isa)
    objects[0] = objects[1]; /* sizes are the keys'; there are no queries */
    const fp_kernels *kernels = kernels_named(module, isa);
    if (!kernels || problem_from(objects, mask, &a, &type) ||
        state_from(tuple, a.batch * a.kv_heads, a.value_dim, &state))
        return NULL;
    a.n = 0;
    size_t bytes = fp_nodes_work(&a, threads);
    void *work = new_work(bytes);
    if (!work)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_nodes_append(kernels, &a, &state, threads, work, bytes);
    Py_END_ALLOW_THREADS
    free_work(work);
    if (status && status != FP_ERR_RANGE)
        return raise_status(status);
    return PyBool_FromLong(!status);
}

PyObject *py_nodes_attend(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"state", "q", "kv_heads", "dim", "scale", "tol", "threads", NULL};
    PyObject *tuple, *object;
    Py_ssize_t kv_heads, dim;
    fp_attention a = {.scale = 1.0, .tol = 1e-6};
    fp_nodes_state state;
    fp_rows rows;
    int threads = 1;
    fp_status status;
    (void)module;
    PARSE("OOnn|ddi", &tuple, &object, &kv_heads, &dim, &a.scale, &a.tol, &threads)
    PyArrayObject *q = array_from(object, "q"), *out = NULL, *needed = NULL;
    if (!q)
        return NULL;
    int type = PyArray_TYPE(q);
    if (kv_heads < 1 || dim < 0 || PyArray_NDIM(q) != 4 ||
        (type != NPY_FLOAT && type != NPY_DOUBLE)) {
        PyErr_SetString(PyExc_ValueError, "q: expected four dimensions of float32 or float64");
        return NULL;
    }
    const npy_intp *shape = PyArray_DIMS(q);
    a.dtype = type == NPY_FLOAT ? FP_F32 : FP_F64;
    a.batch = (size_t)shape[0];
    a.heads = (size_t)shape[1];
    a.n = (size_t)shape[2];
    a.rank = (size_t)shape[3];
    a.kv_heads = (size_t)kv_heads;
    a.value_dim = (size_t)dim;
    a.k.row = (ptrdiff_t)a.rank;
    a.v.row = (ptrdiff_t)a.value_dim;
    if (rows_from(q, "q", shape, type, &a.q) ||
        state_from(tuple, a.batch * a.kv_heads, a.value_dim, &state))
        return NULL;
    npy_intp needed_shape[2] = {shape[0], kv_heads};
    size_t bytes = fp_nodes_work(&a, threads);
    out = new_rows(a.batch, a.heads, a.n, a.value_dim, type, &rows);
    needed = out ? (PyArrayObject *)PyArray_SimpleNew(2, needed_shape, NPY_INT32) : NULL;
    void *work = needed ? new_work(bytes) : NULL;
    if (work) {
        Py_BEGIN_ALLOW_THREADS
        status = fp_nodes_attend(&a, &state, rows, PyArray_DATA(needed), threads, work, bytes);
        Py_END_ALLOW_THREADS
        free_work(work);
        if (!status)
            return Py_BuildValue("NN", out, needed);
        Py_CLEAR(out);
        if (status == FP_ERR_RANGE)
            return Py_BuildValue("ON", Py_None, needed);
        raise_status(status);
    }
    Py_XDECREF(out);
    Py_XDECREF(needed);
    return NULL;
}
