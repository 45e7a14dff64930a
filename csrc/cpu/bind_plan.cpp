#include <cstdint>

#include <pybind11/pybind11.h>

#include "cpu/plan.h"

namespace py = pybind11;

namespace tdc {

void bind_plan(py::module_& module) {
  module.def(
      "routing_plan",
      [](uintptr_t groups, uintptr_t order, uintptr_t inverse, uintptr_t offsets, int64_t batch, int64_t num_groups) {
        return routing_plan(reinterpret_cast<const int64_t*>(groups), reinterpret_cast<int64_t*>(order),
                            reinterpret_cast<int64_t*>(inverse), reinterpret_cast<int32_t*>(offsets), batch,
                            num_groups);
      },
      py::kw_only(), py::arg("groups"), py::arg("order"), py::arg("inverse"), py::arg("offsets"), py::arg("batch"),
      py::arg("num_groups"),
      "Stable counting sort of int64 group ids: fills order and inverse (int64, batch) and offsets (int32, "
      "num_groups + 1). Returns -1, or the index of the first id out of range, with the outputs untouched.");
}

}  // namespace tdc
