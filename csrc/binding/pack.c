/* Packing and unpacking. */
#include "binding.h"

#define PARSE(format, ...)                                                                         \
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, __VA_ARGS__))                    \
        return NULL;

static int mask_from(PyObject *object, size_t n, PyArrayObject **mask, size_t *kept)
{
    if (typed_vector(object, NPY_UINT8, "mask", 0, mask))
        return -1;
    fp_status status = FP_ERR_CORRUPT;
    if ((size_t)PyArray_SIZE(*mask) == fp_mask_bytes(n))
        status = fp_mask_count(PyArray_DATA(*mask), n, kept);
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
    size_t kept;
    (void)module;
    PARSE("On", &object, &n)
    if (n < 0)
        return raise_status(FP_ERR_RANGE);
    if (mask_from(object, (size_t)n, &mask, &kept))
        return NULL;
    return PyLong_FromSize_t(kept);
}

PyObject *py_pack(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "mask", "threads", "isa", NULL};
    PyObject *x, *object;
    int threads = 1;
    const char *isa = NULL;
    size_t kept;
    fp_status status;
    PyArrayObject *mask;
    PARSE("OO|iz", &x, &object, &threads, &isa)
    const fp_kernels *kernels = kernels_named(module, isa);
    PyArrayObject *array = kernels ? contiguous(x, "x") : NULL;
    fp_dtype dtype;
    if (!array || dtype_of(module, array, &dtype) ||
        mask_from(object, (size_t)PyArray_SIZE(array), &mask, &kept))
        return NULL;
    npy_intp shape = (npy_intp)kept;
    PyArray_Descr *descr = PyArray_DESCR(array);
    Py_INCREF(descr); /* PyArray_NewFromDescr takes it */
    PyArrayObject *values =
        (PyArrayObject *)PyArray_NewFromDescr(&PyArray_Type, descr, 1, &shape, NULL, NULL, 0, NULL);
    if (!values)
        return NULL;
    Py_BEGIN_ALLOW_THREADS status = fp_pack(
        kernels, PyArray_DATA(array), (size_t)PyArray_ITEMSIZE(array), (size_t)PyArray_SIZE(array),
        PyArray_DATA(mask), PyArray_DATA(values), kept, threads);
    Py_END_ALLOW_THREADS if (status)
    {
        Py_DECREF(values);
        return raise_status(status);
    }
    return (PyObject *)values;
}

PyObject *py_unpack(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"values", "mask", "shape", "threads", "isa", NULL};
    PyObject *object, *mask_object;
    PyArray_Dims shape = {NULL, 0};
    int threads = 1;
    const char *isa = NULL;
    size_t kept, n = 1;
    fp_status status;
    fp_dtype dtype;
    PyArrayObject *values, *mask, *x = NULL;
    PARSE("OOO&|iz", &object, &mask_object, PyArray_IntpConverter, &shape, &threads, &isa)
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
    if (mask_from(mask_object, n, &mask, &kept))
        goto done;
    if (kept !=
        (size_t)PyArray_SIZE(values)) { /* before anything of the claimed shape is allocated */
        raise_status(FP_ERR_CORRUPT);
        goto done;
    }
    PyArray_Descr *descr = PyArray_DESCR(values);
    Py_INCREF(descr);
    x = (PyArrayObject *)PyArray_NewFromDescr(&PyArray_Type, descr, shape.len, shape.ptr, NULL,
                                              NULL, 0, NULL);
    if (!x)
        goto done;
    Py_BEGIN_ALLOW_THREADS status =
        fp_unpack(kernels, PyArray_DATA(values), kept, (size_t)PyArray_ITEMSIZE(values),
                  PyArray_DATA(mask), n, PyArray_DATA(x), threads);
    Py_END_ALLOW_THREADS if (status)
    {
        Py_CLEAR(x);
        raise_status(status);
    }
done:
    PyDimMem_FREE(shape.ptr);
    return (PyObject *)x;
}
