// A recorded call repeated: allocate, take addresses, launch. See replay.py, which records it and says what is
// repeated.
#pragma once

#include <cstring>
#include <memory>
#include <unordered_map>

#include "python.h"

namespace tdc {

// A tensor of a call and bytes past its first.
struct Source {
  size_t tensor;
  uint64_t past;
};

// The tensors of a call, those of its arguments that are recorded first, then the allocated ones.
struct Memory {
  std::vector<at::Tensor> tensors;
  std::vector<uint64_t> addresses;

  uint64_t at(const Source& source) const { return addresses[source.tensor] + source.past; }
};

class Launch {
 public:
  virtual ~Launch() = default;
  virtual void run(const Memory& memory, const py::object& stream) = 0;
};

// A launch by a Python function of lists of tensors and addresses, and a stream (kernels/recording.py).
class PythonLaunch : public Launch {
 public:
  explicit PythonLaunch(py::object function) : function_(std::move(function)) {}

  void run(const Memory& memory, const py::object& stream) override {
    const auto count = static_cast<Py_ssize_t>(memory.tensors.size());
    const py::object tensors = wrapped(Kind::list, memory.tensors), addresses = checked(PyList_New(count));
    for (Py_ssize_t i = 0; i < count; ++i)
      PyList_SET_ITEM(addresses.ptr(), i, integer(memory.addresses[i]).release().ptr());
    PyObject* arguments[] = {tensors.ptr(), addresses.ptr(), stream.ptr()};
    checked(PyObject_Vectorcall(function_.ptr(), arguments, 3, nullptr));
  }

 private:
  py::object function_;
};

// A launch through Triton's C function (kernels/triton_launcher.py, DirectLaunch).
class TritonLaunch : public Launch {
 public:
  TritonLaunch(const py::object& direct, py::object otherwise)
      : function_(attribute(direct, "function")), hooks_(attribute(direct, "hooks")), otherwise_(std::move(otherwise)),
        before_(items_of(attribute(direct, "before"))), after_(items_of(attribute(direct, "after"))),
        arguments_(items_of(attribute(direct, "arguments"))), apart_(is_true(attribute(direct, "apart"))),
        most_maps_(number_of(attribute(direct, "most_maps"))) {
    for (const py::object& pointer : items_of(attribute(direct, "pointers"))) {
      const std::vector<int64_t> numbers = numbers_of(pointer);
      pointers_.push_back({static_cast<size_t>(numbers.at(0)),
                           {static_cast<size_t>(numbers.at(1)), static_cast<uint64_t>(numbers.at(2))}});
    }
    for (const py::object& box : items_of(attribute(direct, "boxes"))) {
      const std::vector<py::object> parts = items_of(box);
      boxes_.push_back(
          {static_cast<size_t>(number_of(parts.at(0))), static_cast<size_t>(number_of(parts.at(1))), parts.at(2), {}});
    }
  }

  void run(const Memory& memory, const py::object& stream) override {
    if (hooked()) return otherwise_.run(memory, stream);
    std::vector<py::object> passed = arguments_;
    for (const Pointer& pointer : pointers_) passed.at(pointer.at) = integer(memory.at(pointer.source));
    for (Box& box : boxes_) passed.at(box.at) = encoded(box, memory);
    std::vector<PyObject*> given;
    for (const py::object& object : before_) given.push_back(object.ptr());
    given.push_back(stream.ptr());
    for (const py::object& object : after_) given.push_back(object.ptr());
    py::object list;
    if (apart_) {
      for (const py::object& object : passed) given.push_back(object.ptr());
    } else {
      list = checked(PyList_New(static_cast<Py_ssize_t>(passed.size())));
      for (size_t i = 0; i < passed.size(); ++i)
        PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), passed[i].release().ptr());
      given.push_back(list.ptr());
    }
    checked(PyObject_Vectorcall(function_.ptr(), given.data(), given.size(), nullptr));
  }

 private:
  struct Pointer {
    size_t at;
    Source source;
  };
  struct Box {
    size_t at, tensor;
    py::object encode;
    std::unordered_map<uint64_t, py::object> known;  // tensor maps by address
  };

  // Whether a profiler wants to hear of launches: Triton's hooks are chains of calls, or single functions.
  bool hooked() const {
    for (const char* name : {"launch_enter_hook", "launch_exit_hook"}) {
      const py::object hook = attribute(hooks_, name);
      const py::object calls = py::reinterpret_steal<py::object>(PyObject_GetAttrString(hook.ptr(), "calls"));
      if (!calls) PyErr_Clear();
      if (is_true(calls ? calls : hook)) return true;
    }
    return false;
  }

  py::object encoded(Box& box, const Memory& memory) {
    const uint64_t address = memory.addresses[box.tensor];
    const auto found = box.known.find(address);
    if (found != box.known.end()) return found->second;
    const py::object tensor = checked(THPVariable_Wrap(memory.tensors[box.tensor]));
    const py::object made = checked(PyObject_CallOneArg(box.encode.ptr(), tensor.ptr()));
    if (box.known.size() >= most_maps_) box.known.clear();
    box.known[address] = made;
    return made;
  }

  py::object function_, hooks_;
  PythonLaunch otherwise_;
  std::vector<py::object> before_, after_, arguments_;
  bool apart_;
  size_t most_maps_;
  std::vector<Pointer> pointers_;
  std::vector<Box> boxes_;
};

// Launches of the cuda backend (cuda_planned.py, PlannedLaunches): their parameters with other addresses.
class PlannedLaunch : public Launch {
 public:
  explicit PlannedLaunch(const py::object& planned)
      : run_(attribute(planned, "run")), device_(attribute(planned, "device")), make_(attribute(planned, "make")) {
    for (const py::object& form : items_of(attribute(planned, "forms"))) {
      const std::vector<py::object> parts = items_of(form);  // fields, parameters, addresses in them
      Part part;
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(parts.at(0).ptr(), &at, &key, &value);) {
        part.names.push_back(borrowed(key));
        part.values.push_back(borrowed(value));
      }
      part.names.push_back(checked(PyUnicode_FromString("params")));
      py::tuple names(part.names.size());
      for (size_t i = 0; i < part.names.size(); ++i) names[i] = part.names[i];
      part.keywords = names;
      char* bytes;
      Py_ssize_t size;
      if (PyBytes_AsStringAndSize(parts.at(1).ptr(), &bytes, &size) < 0) raise_python_error();
      part.parameters.assign(bytes, size);
      for (const py::object& pointer : items_of(parts.at(2))) {
        const std::vector<int64_t> numbers = numbers_of(pointer);
        part.pointers.push_back({static_cast<size_t>(numbers.at(0)),
                                 {static_cast<size_t>(numbers.at(1)), static_cast<uint64_t>(numbers.at(2))}});
        TORCH_CHECK_VALUE(part.pointers.back().at + sizeof(uint64_t) <= part.parameters.size(),
                          "an address lies outside of a launch's parameters");
      }
      parts_.push_back(std::move(part));
    }
  }

  void run(const Memory& memory, const py::object&) override {
    const py::object launches = checked(PyList_New(static_cast<Py_ssize_t>(parts_.size())));
    for (size_t i = 0; i < parts_.size(); ++i) {
      const Part& part = parts_[i];
      const auto size = static_cast<Py_ssize_t>(part.parameters.size());
      const py::object params = checked(PyBytes_FromStringAndSize(part.parameters.data(), size));
      for (const Pointer& pointer : part.pointers) {
        const uint64_t address = memory.at(pointer.source);
        std::memcpy(PyBytes_AS_STRING(params.ptr()) + pointer.at, &address, sizeof(address));
      }
      std::vector<PyObject*> given;
      for (const py::object& value : part.values) given.push_back(value.ptr());
      given.push_back(params.ptr());
      py::object made = checked(PyObject_Vectorcall(make_.ptr(), given.data(), 0, part.keywords.ptr()));
      PyList_SET_ITEM(launches.ptr(), static_cast<Py_ssize_t>(i), made.release().ptr());
    }
    PyObject* given[] = {launches.ptr(), device_.ptr()};
    checked(PyObject_Vectorcall(run_.ptr(), given, 2, nullptr));
  }

 private:
  struct Pointer {
    size_t at;
    Source source;
  };
  struct Part {
    std::vector<py::object> names, values;
    py::object keywords;
    std::string parameters;
    std::vector<Pointer> pointers;
  };

  py::object run_, device_, make_;
  std::vector<Part> parts_;
};

// What replay.py recorded of a call, as it passes it: places among the arguments, functions that allocate, launches,
// tensors whose memory has to be aligned, tensors that are results, and the type of a result that has several.
class Program {
 public:
  explicit Program(const std::vector<py::object>& recorded) {
    TORCH_CHECK_TYPE(recorded.size() == 6, "a program has six parts");
    for (const int64_t place : numbers_of(recorded[0])) given_.push_back(static_cast<size_t>(place));
    empties_ = items_of(recorded[1]);
    for (const py::object& launch : items_of(recorded[2])) launches_.push_back(made(launch));
    for (const int64_t place : numbers_of(recorded[3])) aligned_.push_back(static_cast<size_t>(place));
    for (const int64_t place : numbers_of(recorded[4])) results_.push_back(static_cast<size_t>(place));
    if (recorded[5].is_none())
      kind_ = Kind::one;
    else
      kind_ = recorded[5].ptr() == reinterpret_cast<PyObject*>(&PyList_Type) ? Kind::list : Kind::tuple;
  }

  Kind kind() const { return kind_; }

  // Whether the call was repeated: false, and nothing is launched, where memory is less aligned.
  // of: the tensor of an argument, by its place. results: where the results go.
  template <class Of>
  bool run(Of of, const py::object& stream, std::vector<at::Tensor>& results) const {
    Memory memory;
    memory.tensors.reserve(given_.size() + empties_.size());
    for (const size_t place : given_) memory.tensors.push_back(of(place));
    for (const py::object& empty : empties_)
      memory.tensors.push_back(tensor_of(checked(PyObject_CallNoArgs(empty.ptr()))));
    memory.addresses.reserve(memory.tensors.size());
    for (const at::Tensor& tensor : memory.tensors)
      memory.addresses.push_back(reinterpret_cast<uint64_t>(tensor.data_ptr()));
    for (const size_t place : aligned_)
      if (memory.addresses.at(place) % kAlignment) return false;
    for (const auto& launch : launches_) launch->run(memory, stream);
    results.clear();
    for (const size_t place : results_) results.push_back(memory.tensors.at(place));
    return true;
  }

 private:
  static constexpr uint64_t kAlignment = 16;  // bytes, as in replay.py

  static std::unique_ptr<Launch> made(const py::object& again) {
    const py::object run = attribute(again, "run"), form = attribute(again, "form");
    if (!form.is_none()) {
      const py::object kind = attribute(form, "kind");
      if (PyUnicode_CompareWithASCIIString(kind.ptr(), "triton") == 0) return std::make_unique<TritonLaunch>(form, run);
      if (PyUnicode_CompareWithASCIIString(kind.ptr(), "planned") == 0) return std::make_unique<PlannedLaunch>(form);
    }
    return std::make_unique<PythonLaunch>(run);
  }

  std::vector<size_t> given_, aligned_, results_;
  std::vector<py::object> empties_;
  std::vector<std::unique_ptr<Launch>> launches_;
  Kind kind_;
};

// A program as Python holds and calls it: program(arguments, stream) -> the result, or None where it was not repeated.
struct ProgramObject {
  PyObject_HEAD vectorcallfunc vectorcall;
  std::shared_ptr<Program>* program;
};

inline PyObject* program_call(PyObject* self, PyObject* const* args, size_t flags, PyObject*) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyVectorcall_NARGS(flags) == 2, "a program takes the arguments and a stream");
  const std::shared_ptr<Program> program = *reinterpret_cast<ProgramObject*>(self)->program;
  const std::vector<py::object> arguments = items_of(args[0]);
  std::vector<at::Tensor> results;
  const auto of = [&](size_t place) { return tensor_of(arguments.at(place)); };
  if (!program->run(of, borrowed(args[1]), results)) Py_RETURN_NONE;
  return wrapped(program->kind(), results).release().ptr();
  END_HANDLE_TH_ERRORS
}

inline void program_dealloc(PyObject* self) {
  delete reinterpret_cast<ProgramObject*>(self)->program;
  Py_TYPE(self)->tp_free(self);
}

inline PyTypeObject ProgramType = {PyVarObject_HEAD_INIT(nullptr, 0)};

inline PyObject* program_new(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  auto program = std::make_shared<Program>(items_of(args));
  py::object self = checked(type->tp_alloc(type, 0));
  auto* object = reinterpret_cast<ProgramObject*>(self.ptr());
  object->vectorcall = program_call;
  object->program = new std::shared_ptr<Program>(std::move(program));
  return self.release().ptr();
  END_HANDLE_TH_ERRORS
}

}  // namespace tdc
