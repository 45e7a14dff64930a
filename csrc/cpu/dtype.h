#pragma once

namespace tdc {

// The element type of activations, parameters and their gradients; sums are fp32 or wider whatever it is.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

}  // namespace tdc
