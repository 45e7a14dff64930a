#pragma once

namespace tdc {

// Devices that can be used now; 0 without a driver or a GPU. Never throws.
int cuda_device_count();

// CUDART_VERSION of the build, such as 13000.
int cuda_runtime_version();

}  // namespace tdc
