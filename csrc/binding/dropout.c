/* Dropout of activations. */
#include "binding.h"

PyObject *py_dropout(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "p", "seed", "threads", "isa", NULL};
    PyObject *object;
    double p;
    unsigned long long seed;
    int threads = 1;
    const char *isa = NULL;
    fp_dtype dtype;
    fp_status status;
    PARSE("OdK|iz", &object, &p, &seed, &threads, &isa)
    const fp_kernels *kernels = kernels_named(module, isa);
    PyArrayObject *x = kernels ? contiguous(object, "x") : NULL;
    if (!x || dtype_of(module, x, &dtype))
        return NULL;
    PyArrayObject *y =
        (PyArrayObject *)PyArray_SimpleNew(PyArray_NDIM(x), PyArray_DIMS(x), PyArray_TYPE(x));
    if (!y)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = fp_dropout(kernels, PyArray_DATA(x), dtype, (size_t)PyArray_SIZE(x), p, seed,
                        PyArray_DATA(y), threads);
    Py_END_ALLOW_THREADS
    return array_or_raise(y, status);
}
