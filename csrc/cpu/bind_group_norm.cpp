#include <cstdint>

#include <pybind11/pybind11.h>

#include "cpu/group_norm.h"

namespace py = pybind11;

namespace tdc {
namespace {

template <typename T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

GroupNormProblem problem_of(uintptr_t offsets, uintptr_t weight_index, uintptr_t widths, int dtype, int64_t batch,
                            int64_t height, int64_t width, int64_t channels, int64_t num_norm_groups, double eps,
                            bool silu, int64_t num_groups, int64_t num_experts, int64_t x2_channels, int threads) {
  GroupNormProblem p;
  p.offsets = at<const int32_t>(offsets);
  p.weight_index = at<const int32_t>(weight_index);
  p.widths = at<const int32_t>(widths);
  p.dtype = static_cast<DType>(dtype);
  p.batch = batch;
  p.height = height;
  p.width = width;
  p.channels = channels;
  p.x2_channels = x2_channels;
  p.num_norm_groups = num_norm_groups;
  p.eps = eps;
  p.silu = silu;
  p.num_groups = num_groups;
  p.num_experts = num_experts;
  p.threads = threads;
  return p;
}

}  // namespace

void bind_group_norm(py::module_& module) {
  module.def(
      "group_norm_forward",
      [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t scale, uintptr_t shift, uintptr_t y, uintptr_t mean,
         uintptr_t rstd, uintptr_t offsets, uintptr_t weight_index, uintptr_t widths, int dtype, int64_t batch,
         int64_t height, int64_t width, int64_t channels, int64_t num_norm_groups, double eps, bool silu,
         int64_t num_groups, int64_t num_experts, uintptr_t x2, int64_t x2_channels, int threads) {
        const GroupNormProblem problem =
            problem_of(offsets, weight_index, widths, dtype, batch, height, width, channels, num_norm_groups, eps, silu,
                       num_groups, num_experts, x2_channels, threads);
        const GroupNormInputs inputs{at(x), at(weight), at(bias), at(scale), at(shift), at(x2)};
        py::gil_scoped_release release;
        group_norm_forward(problem, inputs, at(y), at<float>(mean), at<float>(rstd));
      },
      py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("scale"), py::arg("shift"), py::arg("y"),
      py::arg("mean"), py::arg("rstd"), py::arg("offsets"), py::arg("weight_index"), py::arg("widths"),
      py::arg("dtype"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("channels"),
      py::arg("num_norm_groups"), py::arg("eps"), py::arg("silu"), py::arg("num_groups"), py::arg("num_experts"),
      py::arg("x2") = 0, py::arg("x2_channels") = 0, py::arg("threads"),
      "Group norm with each sample's expert, scale, shift and SiLU over NHWC memory; see csrc/cpu/group_norm.h.");
  module.def(
      "group_norm_backward",
      [](uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t scale, uintptr_t shift, uintptr_t mean,
         uintptr_t rstd, uintptr_t dx, uintptr_t dweight, uintptr_t dbias, uintptr_t dscale, uintptr_t dshift,
         uintptr_t dx2, uintptr_t offsets, uintptr_t weight_index, uintptr_t widths, int dtype, int64_t batch,
         int64_t height, int64_t width, int64_t channels, int64_t num_norm_groups, double eps, bool silu,
         int64_t num_groups, int64_t num_experts, uintptr_t x2, int64_t x2_channels, int threads) {
        const GroupNormProblem problem =
            problem_of(offsets, weight_index, widths, dtype, batch, height, width, channels, num_norm_groups, eps, silu,
                       num_groups, num_experts, x2_channels, threads);
        const GroupNormInputs inputs{at(x), at(weight), at(bias), at(scale), at(shift), at(x2)};
        const GroupNormGrads grads{at(dx), at(dweight), at(dbias), at(dscale), at(dshift), at(dx2)};
        py::gil_scoped_release release;
        group_norm_backward(problem, inputs, at(dy), at<const float>(mean), at<const float>(rstd), grads);
      },
      py::kw_only(), py::arg("dy"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("scale"),
      py::arg("shift"), py::arg("mean"), py::arg("rstd"), py::arg("dx"), py::arg("dweight"), py::arg("dbias"),
      py::arg("dscale"), py::arg("dshift"), py::arg("dx2") = 0, py::arg("offsets"), py::arg("weight_index"),
      py::arg("widths"), py::arg("dtype"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("channels"),
      py::arg("num_norm_groups"), py::arg("eps"), py::arg("silu"), py::arg("num_groups"), py::arg("num_experts"),
      py::arg("x2") = 0, py::arg("x2_channels") = 0, py::arg("threads"),
      "Gradients of group_norm_forward; an output address of 0 is not computed. See csrc/cpu/group_norm.h.");
}

}  // namespace tdc
