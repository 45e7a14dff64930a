// Starts kernels from the registry; every CUDA call is checked.
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "cuda/launch/registry.h"
#include "cuda/launch/tensor_maps.h"

namespace tdc {
namespace {

std::string describe(const Launch& launch) {
  const auto number = [](unsigned value) { return std::to_string(value); };
  return "kernel " + launch.kernel + ", grid (" + number(launch.grid[0]) + ", " + number(launch.grid[1]) + ", " +
         number(launch.grid[2]) + "), " + number(launch.threads) + " threads, " + number(launch.shared_bytes) +
         " bytes of dynamic shared memory, for " + launch.shapes;
}

void check(cudaError_t status, const char* call, const Launch& launch) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(
      std::string(call) + " failed: " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status) + "; " +
      describe(launch) +
      "; or an earlier kernel failed and the error appears only now: set CUDA_LAUNCH_BLOCKING=1 to find out");
}

// Raises the kernel's limit of dynamic shared memory once per kernel, device and larger size. By default it is
// 48 KB less the kernel's static shared memory.
void allow_shared(const void* kernel, int device, const Launch& launch) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, unsigned> allowed;
  std::lock_guard<std::mutex> lock(mutex);
  unsigned& bytes = allowed[{kernel, device}];
  if (bytes >= launch.shared_bytes) return;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(launch.shared_bytes)),
      "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)", launch);
  bytes = launch.shared_bytes;
}

void run(const Launch& launch, int device, cudaStream_t stream) {
  const auto found = kernel_table().find(launch.kernel);
  if (found == kernel_table().end())
    throw std::runtime_error("no kernel of that name in this build: " + describe(launch));
  // The runtime linked into this module keeps its own current device.
  check(cudaSetDevice(device), "cudaSetDevice", launch);
  allow_shared(found->second, device, launch);
  std::vector<unsigned char> encoded;
  if (!launch.tensor_maps.empty()) encoded = encoded_params(launch);
  const std::vector<unsigned char>& bytes = launch.tensor_maps.empty() ? launch.params : encoded;
  void* params = const_cast<unsigned char*>(bytes.data());  // copied by the call
  const dim3 grid(launch.grid[0], launch.grid[1], launch.grid[2]);
  check(cudaLaunchKernel(found->second, grid, dim3(launch.threads), &params, launch.shared_bytes, stream),
        "cudaLaunchKernel", launch);
}

}  // namespace

void cuda_launch(const std::vector<Launch>& launches, int device, uintptr_t stream) {
  for (const Launch& launch : launches) run(launch, device, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace tdc
