// The extension against torch that repeats calls with little host time. It is compiled on the machine that uses it
// (ops/host_build.py), is optional, and knows no operator: Python tells it what to repeat.
#include "calls.h"
#include "program.h"

#include <cstddef>

namespace tdc {
namespace {

PyMethodDef calls_methods[] = {
    {"add", calls_add, METH_VARARGS, "Keeps a call."},
    {"clear", calls_clear, METH_NOARGS, "Forgets all calls."},
    {nullptr, nullptr, 0, nullptr},
};

PySequenceMethods calls_sequence = {};

bool ready(PyTypeObject& type, const char* name, size_t size, size_t vectorcall) {
  type.tp_name = name;
  type.tp_basicsize = static_cast<Py_ssize_t>(size);
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  type.tp_vectorcall_offset = static_cast<Py_ssize_t>(vectorcall);
  type.tp_call = PyVectorcall_Call;
  return PyType_Ready(&type) == 0;
}

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tdc_fast_host", nullptr, -1, nullptr};

PyObject* made_module() {
  CallsType.tp_new = calls_new, CallsType.tp_dealloc = calls_dealloc, CallsType.tp_methods = calls_methods;
  calls_sequence.sq_length = calls_size, CallsType.tp_as_sequence = &calls_sequence;
  ProgramType.tp_new = program_new, ProgramType.tp_dealloc = program_dealloc;
  if (!ready(CallsType, "tdc_fast_host.Calls", sizeof(CallsObject), offsetof(CallsObject, vectorcall)) ||
      !ready(ProgramType, "tdc_fast_host.Program", sizeof(ProgramObject), offsetof(ProgramObject, vectorcall)))
    return nullptr;
  PyObject* module = PyModule_Create(&definition);
  if (!module || PyModule_AddType(module, &CallsType) < 0 || PyModule_AddType(module, &ProgramType) < 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}

}  // namespace
}  // namespace tdc

PyMODINIT_FUNC PyInit_tdc_fast_host() { return tdc::made_module(); }
