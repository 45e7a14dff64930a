// The names of all kernels, for any build: which source to compile for a kernel, and what a test has to cover.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace tdc {

// Family -> names of its kernels. Its device code is cuda/<family>_kernels.cuh.
const std::map<std::string, std::vector<std::string>>& kernel_families();

}  // namespace tdc
