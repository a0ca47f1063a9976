/* Packing and unpacking. */
#include "binding.h"

static int mask_from(const fp_kernels *kernels, PyObject *object, size_t n, PyArrayObject **mask,
                     fp_pack_plan *plan, int threads)
{
    if (typed_vector(object, NPY_UINT8, "mask", 0, mask))
        return -1;
    fp_status status = FP_ERR_CORRUPT;
    if ((size_t)PyArray_SIZE(*mask) == fp_mask_bytes(n))
        status = fp_pack_prepare(kernels, PyArray_DATA(*mask), n, plan, threads);
    if (status) {
        raise_status(status);
        return -1;
    }
    return 0;
}

PyObject *py_mask_count(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"mask", "n", NULL};
    PyObject *object;
    Py_ssize_t n;
    PyArrayObject *mask;
    fp_pack_plan plan;
    PARSE("On", &object, &n)
    if (n < 0)
        return raise_status(FP_ERR_RANGE);
    if (mask_from(state_of(module)->kernels, object, (size_t)n, &mask, &plan, 1))
        return NULL;
    return PyLong_FromSize_t(plan.kept);
}

/* A fresh array of the dtype and shape, or `out` if it has both and can be written to. */
static PyArrayObject *target(PyObject *out, PyArray_Descr *descr, int ndim, npy_intp *shape)
{
    if (out == Py_None) {
        Py_INCREF(descr); /* PyArray_NewFromDescr takes it */
        return (PyArrayObject *)PyArray_NewFromDescr(&PyArray_Type, descr, ndim, shape, NULL, NULL,
                                                     0, NULL);
    }
    PyArrayObject *array = contiguous(out, "out");
    if (!array)
        return NULL;
    if (PyArray_TYPE(array) != descr->type_num || PyArray_NDIM(array) != ndim ||
        !PyArray_CompareLists(PyArray_DIMS(array), shape, ndim) || !PyArray_ISWRITEABLE(array)) {
        PyErr_SetString(PyExc_ValueError, "out: wrong dtype or shape, or read-only");
        return NULL;
    }
    Py_INCREF(array);
    return array;
}

PyObject *py_pack(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "mask", "threads", "isa", "out", NULL};
    PyObject *x, *object, *out = Py_None;
    int threads = 1;
    const char *isa = NULL;
    fp_pack_plan plan;
    fp_status status;
    fp_dtype dtype;
    PyArrayObject *mask;
    PARSE("OO|izO", &x, &object, &threads, &isa, &out)
    const fp_kernels *kernels = kernels_named(module, isa);
    PyArrayObject *array = kernels ? contiguous(x, "x") : NULL;
    if (!array || dtype_of(module, array, &dtype) ||
        mask_from(kernels, object, (size_t)PyArray_SIZE(array), &mask, &plan, threads))
        return NULL;
    npy_intp shape = (npy_intp)plan.kept;
    PyArrayObject *values = target(out, PyArray_DESCR(array), 1, &shape);
    if (!values)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_pack(kernels, &plan, PyArray_DATA(mask), PyArray_DATA(array),
                     (size_t)PyArray_ITEMSIZE(array), PyArray_DATA(values), threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(values, status);
}

PyObject *py_unpack(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"values", "mask", "shape", "threads", "isa", "out", NULL};
    PyObject *object, *mask_object, *out = Py_None;
    PyArray_Dims shape = {NULL, 0};
    int threads = 1;
    const char *isa = NULL;
    size_t n = 1;
    fp_pack_plan plan;
    fp_status status;
    fp_dtype dtype;
    PyArrayObject *values, *mask, *x = NULL;
    PARSE("OOO&|izO", &object, &mask_object, PyArray_IntpConverter, &shape, &threads, &isa, &out)
    const fp_kernels *kernels = kernels_named(module, isa);
    if (!kernels || !(values = contiguous(object, "values")) || dtype_of(module, values, &dtype))
        goto done;
    for (int i = 0; i < shape.len; i++) {
        if (shape.ptr[i] < 0 ||
            (shape.ptr[i] && n > (size_t)PY_SSIZE_T_MAX / (size_t)shape.ptr[i])) {
            raise_status(FP_ERR_OVERFLOW);
            goto done;
        }
        n *= (size_t)shape.ptr[i];
    }
    if (mask_from(kernels, mask_object, n, &mask, &plan, threads))
        goto done;
    if (plan.kept != (size_t)PyArray_SIZE(values)) { /* before the claimed shape is allocated */
        raise_status(FP_ERR_CORRUPT);
        goto done;
    }
    x = target(out, PyArray_DESCR(values), shape.len, shape.ptr);
    if (!x)
        goto done;
    Py_BEGIN_ALLOW_THREADS
    status = fp_unpack(kernels, &plan, PyArray_DATA(mask), PyArray_DATA(values),
                       (size_t)PyArray_ITEMSIZE(values), PyArray_DATA(x), threads);
    Py_END_ALLOW_THREADS
    if (status) {
        Py_CLEAR(x);
        raise_status(status);
    }
done:
    PyDimMem_FREE(shape.ptr);
    return (PyObject *)x;
}
