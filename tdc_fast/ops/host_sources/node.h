// The node that a repeated call leaves in autograd's graph. Its backward is the operator's own, in Python.
#pragma once

#include <memory>
#include <type_traits>

#include "python.h"

namespace tdc {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePointer = std::decay_t<decltype(torch::autograd::Edge::function)>;  // which type depends on torch's version

// What the nodes of calls that are alike have in common.
class Derivative {
 public:
  std::string name;            // of the node
  py::object backward;         // backward(context, saved tensors, gradients) -> a gradient or None for each argument
  py::object context;          // what it knows of the call besides
  std::vector<int64_t> saved;  // places of the tensors to save; -1 - i is result i
  std::vector<int64_t> differentiable;  // places of the results that have gradients
  bool materialize = true;              // whether it takes zeros in the place of absent gradients

  Derivative() = default;
  Derivative(const Derivative&) = delete;

  ~Derivative() {  // graphs are freed in any thread
    if (!Py_IsInitialized()) {
      backward.release(), context.release();
      return;
    }
    py::gil_scoped_acquire gil;
    backward = py::object(), context = py::object();
  }
};

class RoutedNode : public Node {
 public:
  std::shared_ptr<Derivative> derivative;
  std::vector<SavedVariable> saved;

  std::string name() const override { return derivative->name; }

  void release_variables() override {
    py::gil_scoped_acquire gil;  // `apply` in another thread holds it while it reads these
    saved.clear();
    released_ = true;
  }

  // What compiled autograd asks first. It cannot trace a node in C++ that calls Python.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "compiled autograd does not know ", name(),
        " of the extension in C++: set TDC_FAST_HOST=off, so that calls are repeated in Python");
  }

 protected:
  variable_list apply(variable_list&& gradients) override {
    bool any = derivative->materialize;
    for (const at::Tensor& gradient : gradients) any = any || gradient.defined();
    variable_list found(num_outputs());
    if (!any) return found;
    py::gil_scoped_acquire gil;
    if (released_) throw std::runtime_error(torch::autograd::ERR_BACKWARD_TWICE);
    const auto count = static_cast<Py_ssize_t>(gradients.size());
    const py::object given = checked(PyTuple_New(count));
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!gradients[i].defined() && derivative->materialize) gradients[i] = input_metadata(i).zeros_like();
      put(given, i, gradients[i]);
    }
    const py::object unpacked = checked(PyTuple_New(static_cast<Py_ssize_t>(saved.size())));
    for (size_t i = 0; i < saved.size(); ++i) put(unpacked, static_cast<Py_ssize_t>(i), saved[i].unpack());
    PyObject* arguments[] = {derivative->context.ptr(), unpacked.ptr(), given.ptr()};
    const py::object made = checked(PyObject_Vectorcall(derivative->backward.ptr(), arguments, 3, nullptr));
    const std::vector<py::object> items = items_of(made);
    for (size_t i = 0; i < found.size() && i < items.size(); ++i)
      if (!items[i].is_none()) found[i] = tensor_of(items[i]);
    return found;
  }

 private:
  // Wraps a tensor into a tuple; None where there is none.
  static void put(const py::object& tuple, Py_ssize_t at, const at::Tensor& tensor) {
    PyObject* made = THPVariable_Wrap(tensor);
    if (!made) raise_python_error();
    PyTuple_SET_ITEM(tuple.ptr(), at, made);
  }

  bool released_ = false;
};

// A new node, held as this version of torch holds them.
template <class N, class Pointer>
std::pair<N*, Pointer> new_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    auto* node = new N();
    return {node, Pointer(node, [](auto* old) { deleteNode(old); })};  // torch's, without recursion into the graph
  } else {
    auto made = c10::make_intrusive<N>();
    auto* node = made.get();
    return {node, Pointer(std::move(made))};
  }
}

// Gives the results of a call their place in the graph.
template <class Of>
void record(const std::shared_ptr<Derivative>& derivative, size_t tensors, Of of, std::vector<at::Tensor>& results) {
  auto [node, pointer] = new_node<RoutedNode, NodePointer>();
  node->derivative = derivative;
  torch::autograd::edge_list edges;
  edges.reserve(tensors);
  for (size_t i = 0; i < tensors; ++i) {
    const at::Tensor* tensor = of(i);
    const bool wants = tensor && tensor->requires_grad();
    edges.push_back(wants ? torch::autograd::impl::gradient_edge(*tensor) : torch::autograd::Edge());
  }
  node->set_next_edges(std::move(edges));
  for (const int64_t place : derivative->differentiable)
    torch::autograd::set_history(results.at(static_cast<size_t>(place)), pointer);
  node->saved.reserve(derivative->saved.size());
  for (const int64_t place : derivative->saved) {
    const at::Tensor* tensor =
        place < 0 ? &results.at(static_cast<size_t>(-1 - place)) : of(static_cast<size_t>(place));
    node->saved.emplace_back(tensor ? *tensor : at::Tensor(), /*is_output=*/false);
  }
}

}  // namespace tdc
