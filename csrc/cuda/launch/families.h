// The names of all kernels, in every build: which source to compile for a kernel, and what a test has to cover.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace tdc {

// Family (see cuda/families.def) -> names of its kernels.
const std::map<std::string, std::vector<std::string>>& kernel_families();

}  // namespace tdc
