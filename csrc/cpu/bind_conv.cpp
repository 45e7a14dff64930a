// Python bindings of the routed convolution: addresses as integers, 0 for an absent array.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "cpu/conv.h"

namespace py = pybind11;

namespace tdc {
namespace {

using Address = uintptr_t;
using Strides = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Conv2dProblem make_problem(int dtype, int64_t batch, int64_t height, int64_t width, int64_t in_channels,
                           int64_t out_channels, int64_t filter_height, int64_t filter_width, int64_t stride_height,
                           int64_t stride_width, int64_t pad_height, int64_t pad_width, int64_t num_groups,
                           int64_t num_experts, int64_t x2_channels, int64_t upsample, const Strides& strides) {
  Conv2dProblem p = {};
  p.dtype = static_cast<DType>(dtype);
  p.batch = batch, p.height = height, p.width = width;
  p.in_channels = in_channels, p.out_channels = out_channels;
  p.filter_height = filter_height, p.filter_width = filter_width;
  p.stride_height = stride_height, p.stride_width = stride_width;
  p.pad_height = pad_height, p.pad_width = pad_width;
  p.num_groups = num_groups, p.num_experts = num_experts;
  p.x2_channels = x2_channels, p.upsample = upsample;
  std::tie(p.weight_strides[0], p.weight_strides[1], p.weight_strides[2], p.weight_strides[3], p.weight_strides[4]) =
      strides;
  return p;
}

// The problem with the tensors and threads of one call.
Conv2dProblem routed(Conv2dProblem p, Address offsets, Address weight_index, Address in_widths, Address out_widths,
                     int threads) {
  p.offsets = pointer<const int32_t>(offsets);
  p.weight_index = pointer<const int32_t>(weight_index);
  p.in_widths = pointer<const int32_t>(in_widths);
  p.out_widths = pointer<const int32_t>(out_widths);
  p.threads = threads;
  return p;
}

void forward(const Conv2dProblem& p, Address x, Address x2, Address weight, Address bias, Address sample_bias,
             Address residual, Address y, Address offsets, Address weight_index, Address in_widths, Address out_widths,
             int threads) {
  const Conv2dProblem problem = routed(p, offsets, weight_index, in_widths, out_widths, threads);
  py::gil_scoped_release release;
  conv2d_forward(problem, {pointer(x), pointer(x2)}, pointer(weight), pointer(bias), pointer(sample_bias),
                 pointer(residual), pointer(y));
}

void dgrad(const Conv2dProblem& p, Address dy, Address weight, Address dx, Address dx2, Address offsets,
           Address weight_index, Address in_widths, Address out_widths, int threads) {
  const Conv2dProblem problem = routed(p, offsets, weight_index, in_widths, out_widths, threads);
  py::gil_scoped_release release;
  conv2d_dgrad(problem, pointer(dy), pointer(weight), pointer(dx), pointer(dx2));
}

void wgrad(const Conv2dProblem& p, Address x, Address x2, Address dy, Address dweight, Address dbias,
           Address dsample_bias, Address offsets, Address weight_index, Address in_widths, Address out_widths,
           int threads) {
  const Conv2dProblem problem = routed(p, offsets, weight_index, in_widths, out_widths, threads);
  py::gil_scoped_release release;
  conv2d_wgrad(problem, {pointer(x), pointer(x2)}, pointer(dy), pointer(dweight), pointer(dbias),
               pointer(dsample_bias));
}

}  // namespace

void bind_conv(py::module_& module) {
  const auto optional = [](const char* name) { return py::arg(name) = 0; };
  py::class_<Conv2dProblem>(module, "Conv2d",
                            "A routed convolution of one geometry, whose tensors are still missing. Its methods take "
                            "addresses and a number of threads; arguments in their order cost the least time.")
      .def(py::init(&make_problem), py::kw_only(), py::arg("dtype"), py::arg("batch"), py::arg("height"),
           py::arg("width"), py::arg("in_channels"), py::arg("out_channels"), py::arg("filter_height"),
           py::arg("filter_width"), py::arg("stride_height"), py::arg("stride_width"), py::arg("pad_height"),
           py::arg("pad_width"), py::arg("num_groups"), py::arg("num_experts"), py::arg("x2_channels") = 0,
           py::arg("upsample") = 1, py::arg("weight_strides"))
      .def("forward", &forward, py::arg("x"), optional("x2"), py::arg("weight"), optional("bias"),
           optional("sample_bias"), optional("residual"), py::arg("y"), py::arg("offsets"), optional("weight_index"),
           optional("in_widths"), optional("out_widths"), py::arg("threads"),
           "y = routed conv2d of x (and x2), plus bias, sample_bias and residual where given.")
      .def("dgrad", &dgrad, py::arg("dy"), py::arg("weight"), py::arg("dx"), optional("dx2"), py::arg("offsets"),
           optional("weight_index"), optional("in_widths"), optional("out_widths"), py::arg("threads"),
           "dx (and dx2) of the routed conv2d.")
      .def("wgrad", &wgrad, py::arg("x"), optional("x2"), py::arg("dy"), optional("dweight"), optional("dbias"),
           optional("dsample_bias"), py::arg("offsets"), optional("weight_index"), optional("in_widths"),
           optional("out_widths"), py::arg("threads"),
           "dweight, dbias and dsample_bias of the routed conv2d, each where given.");
}

}  // namespace tdc
