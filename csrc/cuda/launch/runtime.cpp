// What the rest of the core needs to know about the CUDA runtime it was built with.
#include "cuda/launch/runtime.h"

#include <cuda_runtime_api.h>

namespace tdc {

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace tdc
