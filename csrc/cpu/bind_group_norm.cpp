// Python bindings of the routed group norm: addresses as integers, 0 for an absent array.
#include <cstdint>
#include <cstring>

#include <pybind11/pybind11.h>

#include "cpu/group_norm.h"

namespace py = pybind11;

namespace tdc {
namespace {

using Address = uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

GroupNormProblem make_norm(int dtype, int64_t batch, int64_t height, int64_t width, int64_t channels,
                           int64_t num_norm_groups, double eps, bool silu, int64_t num_groups, int64_t num_experts,
                           int64_t x2_channels) {
  GroupNormProblem p;
  p.dtype = static_cast<DType>(dtype);
  p.batch = batch, p.height = height, p.width = width;
  p.channels = channels, p.x2_channels = x2_channels;
  p.num_norm_groups = num_norm_groups, p.eps = eps, p.silu = silu;
  p.num_groups = num_groups, p.num_experts = num_experts;
  return p;
}

// The problem with the tensors and threads of one call.
GroupNormProblem routed(GroupNormProblem p, Address offsets, Address weight_index, Address widths, int threads) {
  p.offsets = at<const int32_t>(offsets);
  p.weight_index = at<const int32_t>(weight_index);
  p.widths = at<const int32_t>(widths);
  p.threads = threads;
  return p;
}

void norm_forward(const GroupNormProblem& p, Address x, Address x2, Address weight, Address bias, Address scale,
                  Address shift, Address y, Address mean, Address rstd, Address counters, Address offsets,
                  Address weight_index, Address widths, int threads) {
  const GroupNormProblem problem = routed(p, offsets, weight_index, widths, threads);
  py::gil_scoped_release release;
  group_norm_forward(problem, {at(x), at(weight), at(bias), at(scale), at(shift), at(x2)}, at(y), at<float>(mean),
                     at<float>(rstd));
  if (counters) std::memset(at(counters), 0, problem.num_experts * problem.num_norm_groups * sizeof(int32_t));
}

void norm_backward(const GroupNormProblem& p, Address dy, Address x, Address x2, Address weight, Address bias,
                   Address scale, Address shift, Address mean, Address rstd, Address dx, Address dweight, Address dbias,
                   Address dscale, Address dshift, Address dx2, Address offsets, Address weight_index, Address widths,
                   int threads) {
  const GroupNormProblem problem = routed(p, offsets, weight_index, widths, threads);
  py::gil_scoped_release release;
  group_norm_backward(problem, {at(x), at(weight), at(bias), at(scale), at(shift), at(x2)}, at(dy),
                      at<const float>(mean), at<const float>(rstd),
                      {at(dx), at(dweight), at(dbias), at(dscale), at(dshift), at(dx2)});
}

}  // namespace

void bind_group_norm(py::module_& module) {
  const auto optional = [](const char* name) { return py::arg(name) = 0; };
  py::class_<GroupNormProblem>(module, "GroupNorm",
                               "A routed group norm of one geometry, whose tensors are still missing; see "
                               "csrc/cpu/group_norm.h. Its methods take addresses and a number of threads; arguments "
                               "in their order cost the least time.")
      .def(py::init(&make_norm), py::kw_only(), py::arg("dtype"), py::arg("batch"), py::arg("height"), py::arg("width"),
           py::arg("channels"), py::arg("num_norm_groups"), py::arg("eps"), py::arg("silu"), py::arg("num_groups"),
           py::arg("num_experts"), py::arg("x2_channels") = 0)
      .def("forward", &norm_forward, py::arg("x"), optional("x2"), optional("weight"), optional("bias"),
           optional("scale"), optional("shift"), py::arg("y"), py::arg("mean"), py::arg("rstd"), optional("counters"),
           py::arg("offsets"), optional("weight_index"), optional("widths"), py::arg("threads"),
           "y, mean and rstd of the routed group norm; counters become zeros.")
      .def("backward", &norm_backward, py::arg("dy"), py::arg("x"), optional("x2"), optional("weight"),
           optional("bias"), optional("scale"), optional("shift"), py::arg("mean"), py::arg("rstd"), optional("dx"),
           optional("dweight"), optional("dbias"), optional("dscale"), optional("dshift"), optional("dx2"),
           py::arg("offsets"), optional("weight_index"), optional("widths"), py::arg("threads"),
           "The gradients of the routed group norm, each where given.");
}

}  // namespace tdc
