// tdc_fast._native: the torch-free core. Functions take addresses (0 = absent), sizes and a thread count. The callers
// in tdc_fast/ops check shapes and dtypes; numbers that kernels index with are checked here.
#include <pybind11/pybind11.h>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace py = pybind11;

namespace tdc {
void bind_plan(py::module_& module);
void bind_conv(py::module_& module);
void bind_group_norm(py::module_& module);
void bind_cuda(py::module_& module);
}  // namespace tdc

PYBIND11_MODULE(_native, module) {
  module.def("cpu_isa", &tdc::cpu_isa_name, "Instruction set in use: 'avx512', 'avx2' or 'portable'.");
  module.def("parallel_backend", &tdc::parallel_backend, "'openmp' (the process's pool) or 'threads' (our own).");
  tdc::bind_plan(module);
  tdc::bind_conv(module);
  tdc::bind_group_norm(module);
  tdc::bind_cuda(module);
}
