#pragma once

namespace tdc {

// The element type of activations, parameters and their gradients; sums are always fp32 or wider.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

}  // namespace tdc
