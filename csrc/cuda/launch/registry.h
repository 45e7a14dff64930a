// The kernels that nvcc built into this module by name, and what starts them. NVRTC and the emulator do
// not use it.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/launch/launch.h"

namespace tdc {

// extern "C" name -> the host's handle of the kernel, as cudaLaunchKernel takes it.
using KernelTable = std::unordered_map<std::string, const void*>;

// The kernels of all families of families.def.
const KernelTable& kernel_table();

// Starts the launches in order on `stream` of device number `device`. Raises std::runtime_error with the kernel's name,
// its shapes and CUDA's message as soon as a call fails. Several threads may call it at once.
void cuda_launch(const std::vector<Launch>& launches, int device, uintptr_t stream);

}  // namespace tdc
