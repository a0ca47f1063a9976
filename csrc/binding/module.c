/* The extension module foldprune._core. */
#define FOLDPRUNE_IMPORT_ARRAY
#include "binding.h"

#include <string.h>

#include "lapack.h"
#include "parallel.h"

static PyObject *py_isa(PyObject *module, PyObject *ignored)
{
    (void)ignored;
    return PyUnicode_FromString(fp_kernels_name(state_of(module)->kernels));
}

static PyObject *py_isas(PyObject *module, PyObject *ignored)
{
    PyObject *result = PyDict_New();
    (void)module;
    (void)ignored;
    for (size_t i = 0; result && fp_isa_name(i); i++) {
        PyObject *pair = Py_BuildValue("OO", fp_isa_compiled(i) ? Py_True : Py_False,
                                       fp_isa_supported(i) ? Py_True : Py_False);
        if (!pair || PyDict_SetItemString(result, fp_isa_name(i), pair))
            Py_CLEAR(result);
        Py_XDECREF(pair);
    }
    return result;
}

#define METHOD(name)                                                                               \
    {#name, (PyCFunction)(void (*)(void))py_##name, METH_VARARGS | METH_KEYWORDS, NULL}

/* use_team(address of GOMP_parallel; 0 for the core's own pool) */
static PyObject *py_use_team(PyObject *module, PyObject *address)
{
    (void)module;
    void *found = PyLong_AsVoidPtr(address);
    if (!found && PyErr_Occurred())
        return NULL;
    fp_team team;
    memcpy(&team, &found, sizeof team); /* POSIX: a function's address is a void pointer's bits */
    fp_parallel_use(team);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"isa", py_isa, METH_NOARGS, NULL},
    {"isas", py_isas, METH_NOARGS, NULL},
    {"use_team", py_use_team, METH_O, NULL},
    METHOD(all_finite),
    METHOD(energy),
    METHOD(histogram),
    METHOD(select),
    METHOD(mask_threshold),
    METHOD(mask_rows),
    METHOD(mask_nm),
    METHOD(mask_blocks),
    METHOD(mask_count),
    METHOD(block_scores),
    METHOD(pack),
    METHOD(unpack),
    METHOD(irc_spectrum),
    METHOD(irc),
    METHOD(dwc_spectrum),
    METHOD(dwc_select),
    METHOD(dwc_remainder),
    METHOD(rope_scores),
    METHOD(rope),
    METHOD(check_rows),
    METHOD(moments_update),
    METHOD(square_sums),
    METHOD(count_rows),
    METHOD(obs_factor),
    METHOD(obs_sweep),
    METHOD(refit),
    METHOD(swap),
    METHOD(damage),
    METHOD(attention),
    METHOD(attention_backward),
    METHOD(nodes_append),
    METHOD(nodes_attend),
    METHOD(dropout),
    METHOD(packed_mask),
    METHOD(packed_offsets),
    METHOD(packed_fill),
    METHOD(packed_quantise),
    METHOD(packed_unpack),
    METHOD(packed_lookup),
    METHOD(packed_lookup_gradient),
    METHOD(matmul),
    METHOD(matmul_backward),
    METHOD(matmul_gradient),
    METHOD(matmul_choice),
    {NULL, NULL, 0, NULL},
};

module_state *state_of(PyObject *module)
{
    return PyModule_GetState(module);
}

static int module_exec(PyObject *module)
{
    module_state *state = state_of(module);
    import_array1(-1);
    PyObject *ml_dtypes = PyImport_ImportModule("ml_dtypes");
    if (!ml_dtypes)
        return -1;
    PyObject *type = PyObject_GetAttrString(ml_dtypes, "bfloat16");
    Py_DECREF(ml_dtypes);
    int found = type && PyArray_DescrConverter(type, &state->bfloat16);
    Py_XDECREF(type);
    if (!found)
        return -1;
    state->kernels = fp_kernels_default();
    if (!state->kernels) {
        PyErr_SetString(PyExc_ImportError,
                        "FOLDPRUNE_ISA names a kernel variant that this build or "
                        "processor lacks; unset it to use the best one");
        return -1;
    }
    fp_blas_set_threads(1);
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(state_of(module)->bfloat16);
    return 0;
}

static int module_clear(PyObject *module)
{
    Py_CLEAR(state_of(module)->bfloat16);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
#if PY_VERSION_HEX >= 0x030c0000
    /* NumPy itself declines sub-interpreters */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030d0000
    /* calls share no mutable state: safe without the global lock */
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "foldprune._core",
    .m_doc = "The C core. Private: use the functions of foldprune.",
    .m_size = sizeof(module_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
