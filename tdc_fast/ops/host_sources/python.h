// What the other files need of Python's C interface and of torch. The GIL is held wherever a function here says
// nothing.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tdc {

// Raises the error that Python has set, in a form that crosses threads, as torch's own nodes of the graph do.
[[noreturn]] inline void raise_python_error() {
  python_error error;
  error.persist();
  throw std::move(error);
}

// Takes over a new reference; an error where there is none.
inline py::object checked(PyObject* made) {
  if (!made) raise_python_error();
  return py::reinterpret_steal<py::object>(made);
}

inline py::object borrowed(PyObject* object) { return py::reinterpret_borrow<py::object>(object); }

inline py::object integer(uint64_t value) { return checked(PyLong_FromUnsignedLongLong(value)); }

// An attribute; with what Python would raise where there is none.
inline py::object attribute(py::handle of, const char* name) { return checked(PyObject_GetAttrString(of.ptr(), name)); }

inline bool is_true(py::handle object) {
  const int truth = PyObject_IsTrue(object.ptr());
  if (truth < 0) raise_python_error();
  return truth == 1;
}

// The items of a sequence.
inline std::vector<py::object> items_of(py::handle sequence) {
  const py::object fast = checked(PySequence_Fast(sequence.ptr(), "a sequence is expected"));
  std::vector<py::object> items;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.ptr()); ++i)
    items.push_back(borrowed(PySequence_Fast_GET_ITEM(fast.ptr(), i)));
  return items;
}

inline int64_t number_of(py::handle object) {
  const long long value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) raise_python_error();
  return value;
}

inline std::vector<int64_t> numbers_of(py::handle sequence) {
  std::vector<int64_t> numbers;
  for (const py::object& item : items_of(sequence)) numbers.push_back(number_of(item));
  return numbers;
}

inline const at::Tensor& tensor_of(py::handle object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object.ptr()), "a tensor is expected");
  return THPVariable_Unpack(object.ptr());
}

// The tensors of what an operator returned: one, or a list or tuple of them.
inline std::vector<at::Tensor> tensors_of(py::handle result) {
  if (THPVariable_Check(result.ptr())) return {THPVariable_Unpack(result.ptr())};
  std::vector<at::Tensor> tensors;
  for (const py::object& item : items_of(result)) tensors.push_back(tensor_of(item));
  return tensors;
}

// How an operator returns its tensors.
enum class Kind { one, list, tuple };

inline Kind kind_of(py::handle result) {
  if (PyList_Check(result.ptr())) return Kind::list;
  return PyTuple_Check(result.ptr()) ? Kind::tuple : Kind::one;
}

inline py::object wrapped(Kind kind, const std::vector<at::Tensor>& tensors) {
  if (kind == Kind::one) return checked(THPVariable_Wrap(tensors.at(0)));
  const auto count = static_cast<Py_ssize_t>(tensors.size());
  const py::object made = checked(kind == Kind::list ? PyList_New(count) : PyTuple_New(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* tensor = THPVariable_Wrap(tensors[i]);
    if (!tensor) raise_python_error();
    if (kind == Kind::list)
      PyList_SET_ITEM(made.ptr(), i, tensor);
    else
      PyTuple_SET_ITEM(made.ptr(), i, tensor);
  }
  return made;
}

}  // namespace tdc
