// The calls of one operator that went well, and how they are repeated: the C++ form of call_cache.py, which fills it in
// and does whatever is not found here.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <unordered_map>

#include "node.h"
#include "program.h"

namespace at::autocast {
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType device_type);  // its own header takes seconds to compile
}

namespace tdc {

constexpr size_t kMostArguments = 32;

inline const c10::DispatchKeySet& autocast_keys() {
  static const c10::DispatchKeySet keys({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});
  return keys;
}

// The metadata of a tensor. `keys` are those that a call of an operator would see: they tell of torch.func, autocast
// and inference mode, too.
struct Metadata {
  uint64_t keys;
  at::ScalarType dtype;
  at::Device device;
  bool requires_grad;
  std::vector<int64_t> sizes, strides;
  int64_t span;  // elements from the first to the end of the last; 0 where there are none

  Metadata(const at::Tensor& t, uint64_t keys)
      : keys(keys), dtype(t.scalar_type()), device(t.device()), requires_grad(t.requires_grad()),
        sizes(t.sizes().vec()), strides(t.strides().vec()), span(t.numel() ? 1 : 0) {
    for (size_t i = 0; span && i < sizes.size(); ++i) span += (sizes[i] - 1) * strides[i];
  }

  bool fits(const at::Tensor& t, uint64_t its_keys) const {
    return its_keys == keys && t.scalar_type() == dtype && t.device() == device && t.requires_grad() == requires_grad &&
           t.sizes() == at::IntArrayRef(sizes) && t.strides() == at::IntArrayRef(strides);
  }

  // Whether the storage covers the tensor.
  bool is_in_memory(const at::Tensor& t) const {
    if (!span) return true;
    const auto bytes = static_cast<uint64_t>(t.storage_offset() + span) * t.element_size();
    return t.storage().nbytes() >= bytes;
  }
};

// What a call is found by.
struct Signature {
  std::array<const at::Tensor*, kMostArguments> tensors{};  // nullptr where there is None
  std::array<uint64_t, kMostArguments> keys{};
  PyObject* environment = nullptr;  // borrowed
  int autocast = -1;                // the dtype to which autocast casts, or -1
  bool tf32 = false;
  uint64_t hash = 14695981039346656037ull;

  void mix(uint64_t word) { hash = (hash ^ word) * 1099511628211ull; }

  // Whether one tensor is in several places.
  bool repeats_a_tensor() const {
    for (size_t i = 1; i < tensors.size(); ++i)
      if (tensors[i] && std::find(tensors.begin(), tensors.begin() + i, tensors[i]) != tensors.begin() + i) return true;
    return false;
  }
};

struct Entry {
  std::vector<PyTypeObject*> types;
  std::vector<Metadata> tensors;  // of those that are given
  std::vector<py::object> settings;
  py::object environment;
  int autocast;
  bool tf32, differentiable;
  py::object run;  // Python's way to compute it
  bool records;    // whether `run` comes to hold a program, which has to be recorded with tensors that all differ
  std::shared_ptr<Program> program;
  std::shared_ptr<Derivative> derivative;
};

class Calls {
 public:
  // Of `Operator.calls` in call_cache.py:
  size_t count, tensors;             // arguments, and those that are tensors, which come first
  bool is_cast;                      // whether autocast changes the arguments
  py::object otherwise;              // what does a call that is not found
  std::vector<py::object> watchers;  // functions that say whether something watches a call
  py::object forward_ad;             // the namespace of torch.autograd.forward_ad
  py::object variables, variable;    // the environment, and the name of what is read of it
  py::object tf32_is_allowed;
  py::object device, stream;  // functions that tell the current device, and the stream of one
  size_t most, most_alike;

  void clear() { entries_.clear(), kept_ = 0; }
  size_t size() const { return kept_; }

  // Keeps a call that went well.
  void add(PyObject* const* args, std::shared_ptr<Entry> entry) {
    Signature signature;
    if (!describe(args, signature)) return;
    for (size_t i = 0; i < count; ++i) entry->types.push_back(Py_TYPE(args[i]));
    for (size_t i = 0; i < tensors; ++i) {
      if (!signature.tensors[i]) continue;
      entry->tensors.emplace_back(*signature.tensors[i], signature.keys[i]);
      entry->differentiable = entry->differentiable || entry->tensors.back().requires_grad;
    }
    for (size_t i = tensors; i < count; ++i) entry->settings.push_back(borrowed(args[i]));
    entry->environment = borrowed(signature.environment);
    entry->autocast = signature.autocast, entry->tf32 = signature.tf32;
    if (kept_ >= most) clear();
    auto& alike = entries_[signature.hash];
    alike.insert(alike.begin(), std::move(entry));
    ++kept_;
    if (alike.size() > most_alike) alike.pop_back(), --kept_;
  }

  // The result of a call, or nullptr without an error where the general way has to do it.
  PyObject* repeat(PyObject* const* args) {
    if (is_watched()) return nullptr;
    Signature signature;
    if (!describe(args, signature)) return nullptr;
    const std::shared_ptr<Entry> entry = find(args, signature);
    if (!entry || (entry->records && signature.repeats_a_tensor())) return nullptr;
    const bool graph = entry->derivative && entry->differentiable && at::GradMode::is_enabled();
    std::optional<c10::impl::ExcludeDispatchKeyGuard> below;
    if (signature.autocast >= 0) below.emplace(autocast_keys());
    if (!graph) {
      if (entry->program) {
        std::vector<at::Tensor> results;
        if (launched(*entry, signature, results)) return wrapped(entry->program->kind(), results).release().ptr();
      }
      return in_python(*entry, args).release().ptr();
    }
    const auto of = [&](size_t place) { return signature.tensors[place]; };
    std::vector<at::Tensor> results;
    Kind kind;
    if (entry->program && launched(*entry, signature, results)) {
      kind = entry->program->kind();
    } else {
      at::AutoGradMode off(false);
      const py::object result = in_python(*entry, args);
      kind = kind_of(result), results = tensors_of(result);
    }
    record(entry->derivative, tensors, of, results);
    return wrapped(kind, results).release().ptr();
  }

 private:
  bool is_watched() const {
    for (const py::object& watcher : watchers)
      if (is_true(checked(PyObject_CallNoArgs(watcher.ptr())))) return true;
    static PyObject* const level = PyUnicode_InternFromString("_current_level");
    PyObject* current = PyDict_GetItemWithError(forward_ad.ptr(), level);
    return !current || number_of(current) >= 0;
  }

  // Takes tensors and state; false for arguments that are no plain tensors, which the general way tells about.
  bool describe(PyObject* const* args, Signature& signature) const {
    const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
    for (size_t i = 0; i < tensors; ++i) {
      signature.mix(args[i] == Py_None);
      if (args[i] == Py_None) continue;
      if (!THPVariable_CheckExact(args[i])) return false;
      const at::Tensor& t = THPVariable_Unpack(args[i]);
      if (!t.defined() || t.layout() != at::kStrided || t.is_nested() ||
          t.unsafeGetTensorImpl()->has_symbolic_sizes_strides())
        return false;
      signature.tensors[i] = &t;
      signature.keys[i] = ((t.key_set() | local.included_) - local.excluded_).raw_repr();
      if (i < 2)
        for (const int64_t size : t.sizes()) signature.mix(static_cast<uint64_t>(size));
    }
    const at::Tensor* first = signature.tensors[0];
    if (!first) return false;
    signature.mix(static_cast<uint64_t>(first->scalar_type()));
    for (size_t i = tensors; i < count; ++i) {
      const Py_hash_t hash = PyObject_Hash(args[i]);
      if (hash == -1) {
        PyErr_Clear();
        return false;
      }
      signature.mix(static_cast<uint64_t>(hash));
    }
    if (is_cast && c10::DispatchKeySet(c10::DispatchKeySet::RAW, signature.keys[0]).has_any(autocast_keys()))
      signature.autocast = static_cast<int>(at::autocast::get_autocast_dtype(first->device().type()));
    if (first->scalar_type() == at::kFloat)
      signature.tf32 = is_true(checked(PyObject_CallNoArgs(tf32_is_allowed.ptr())));
    signature.environment = PyDict_GetItemWithError(variables.ptr(), variable.ptr());
    if (!signature.environment) {
      if (PyErr_Occurred()) raise_python_error();
      signature.environment = Py_None;
    }
    return true;
  }

  std::shared_ptr<Entry> find(PyObject* const* args, const Signature& signature) {
    const auto found = entries_.find(signature.hash);
    if (found == entries_.end()) return nullptr;
    auto& alike = found->second;
    for (size_t i = 0; i < alike.size(); ++i) {
      const std::shared_ptr<Entry> entry = alike[i];
      if (!fits(*entry, args, signature)) continue;
      if (i) std::swap(alike[0], alike[i]);
      size_t given = 0;
      for (size_t place = 0; place < tensors; ++place)
        if (signature.tensors[place] && !entry->tensors[given++].is_in_memory(*signature.tensors[place]))
          return nullptr;
      return entry;
    }
    return nullptr;
  }

  bool fits(const Entry& entry, PyObject* const* args, const Signature& signature) const {
    if (entry.autocast != signature.autocast || entry.tf32 != signature.tf32) return false;
    for (size_t i = 0; i < count; ++i)
      if (Py_TYPE(args[i]) != entry.types[i]) return false;
    size_t given = 0;
    for (size_t i = 0; i < tensors; ++i)
      if (signature.tensors[i] && !entry.tensors[given++].fits(*signature.tensors[i], signature.keys[i])) return false;
    for (size_t i = tensors; i < count; ++i)
      if (!are_equal(entry.settings[i - tensors].ptr(), args[i])) return false;
    return are_equal(entry.environment.ptr(), signature.environment);
  }

  static bool are_equal(PyObject* one, PyObject* other) {
    const int same = PyObject_RichCompareBool(one, other, Py_EQ);
    if (same < 0) raise_python_error();
    return same == 1;
  }

  // Whether the program launched the call; not on a device that is not the current one, and not if it declines.
  bool launched(const Entry& entry, const Signature& signature, std::vector<at::Tensor>& results) const {
    const at::Device where = signature.tensors[0]->device();
    py::object of_device;
    if (where.is_cuda()) {
      if (number_of(checked(PyObject_CallNoArgs(device.ptr()))) != where.index()) return false;
      const py::object index = checked(PyLong_FromLong(where.index()));
      of_device = checked(PyObject_CallOneArg(stream.ptr(), index.ptr()));
    } else {
      of_device = integer(0);
    }
    const std::shared_ptr<Program> program = entry.program;
    return program->run([&](size_t place) { return *signature.tensors[place]; }, of_device, results);
  }

  py::object in_python(Entry& entry, PyObject* const* args) const {
    py::object result = checked(PyObject_Vectorcall(entry.run.ptr(), args, count, nullptr));
    if (entry.records && !entry.program) {
      const py::object again = attribute(entry.run, "again");
      if (Py_IS_TYPE(again.ptr(), &ProgramType))
        entry.program = *reinterpret_cast<ProgramObject*>(again.ptr())->program;
      entry.records = again.is_none();
    }
    return result;
  }

  std::unordered_map<uint64_t, std::vector<std::shared_ptr<Entry>>> entries_;
  size_t kept_ = 0;
};

struct CallsObject {
  PyObject_HEAD vectorcallfunc vectorcall;
  Calls* calls;
};

inline Calls& calls_of(PyObject* self) { return *reinterpret_cast<CallsObject*>(self)->calls; }

inline PyObject* calls_call(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
  HANDLE_TH_ERRORS
  Calls& calls = calls_of(self);
  const auto given = static_cast<size_t>(PyVectorcall_NARGS(flags));
  if (!names && given == calls.count) {
    PyObject* result = calls.repeat(args);
    if (result) return result;
  }
  return PyObject_Vectorcall(calls.otherwise.ptr(), args, given, names);
  END_HANDLE_TH_ERRORS
}

// add(arguments, run, records, derivative), where derivative is None or (name, backward, context, saved,
// differentiable, materialize), as of `Derivative`.
inline PyObject* calls_add(PyObject* self, PyObject* args) {
  HANDLE_TH_ERRORS
  const std::vector<py::object> given = items_of(args);
  TORCH_CHECK_TYPE(given.size() == 4, "add takes four arguments");
  auto entry = std::make_shared<Entry>();
  entry->run = given[1], entry->records = is_true(given[2]), entry->differentiable = false;
  if (!given[3].is_none()) {
    const std::vector<py::object> parts = items_of(given[3]);
    TORCH_CHECK_TYPE(parts.size() == 6, "a derivative has six parts");
    auto derivative = std::make_shared<Derivative>();
    derivative->name = parts[0].cast<std::string>();
    derivative->backward = parts[1], derivative->context = parts[2];
    derivative->saved = numbers_of(parts[3]), derivative->differentiable = numbers_of(parts[4]);
    derivative->materialize = is_true(parts[5]);
    entry->derivative = std::move(derivative);
  }
  std::vector<PyObject*> arguments;
  const std::vector<py::object> held = items_of(given[0]);
  for (const py::object& argument : held) arguments.push_back(argument.ptr());
  Calls& calls = calls_of(self);
  TORCH_CHECK_TYPE(arguments.size() == calls.count, "a call has as many arguments as its operator");
  calls.add(arguments.data(), std::move(entry));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

inline PyObject* calls_clear(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  calls_of(self).clear();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

inline Py_ssize_t calls_size(PyObject* self) { return static_cast<Py_ssize_t>(calls_of(self).size()); }

inline void calls_dealloc(PyObject* self) {
  delete reinterpret_cast<CallsObject*>(self)->calls;
  Py_TYPE(self)->tp_free(self);
}

// Calls(settings): an object with the attributes that `Calls` has in C++.
inline PyObject* calls_new(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  const std::vector<py::object> given = items_of(args);
  TORCH_CHECK_TYPE(given.size() == 1, "Calls takes one argument");
  const py::object& settings = given[0];
  auto calls = std::make_unique<Calls>();
  calls->count = number_of(attribute(settings, "count")), calls->tensors = number_of(attribute(settings, "tensors"));
  TORCH_CHECK_VALUE(calls->count <= kMostArguments && calls->tensors <= calls->count && calls->tensors >= 2,
                    "an operator has at most ", kMostArguments, " arguments, two of which are tensors");
  calls->is_cast = is_true(attribute(settings, "is_cast"));
  calls->otherwise = attribute(settings, "otherwise");
  calls->watchers = items_of(attribute(settings, "watchers"));
  calls->forward_ad = attribute(settings, "forward_ad");
  calls->variables = attribute(settings, "variables"), calls->variable = attribute(settings, "variable");
  calls->tf32_is_allowed = attribute(settings, "tf32_is_allowed");
  calls->device = attribute(settings, "device"), calls->stream = attribute(settings, "stream");
  calls->most = number_of(attribute(settings, "most")),
  calls->most_alike = number_of(attribute(settings, "most_alike"));
  py::object self = checked(type->tp_alloc(type, 0));
  auto* object = reinterpret_cast<CallsObject*>(self.ptr());
  object->vectorcall = calls_call;
  object->calls = calls.release();
  return self.release().ptr();
  END_HANDLE_TH_ERRORS
}

inline PyTypeObject CallsType = {PyVarObject_HEAD_INIT(nullptr, 0)};

}  // namespace tdc
