// Tensor maps (cuda/tensor_map.h) as the driver encodes them.
#pragma once

#include <vector>

#include "cuda/launch/launch.h"

namespace tdc {

// The parameters of a launch with every description of a tensor map replaced by the driver's encoding. Encodings are
// remembered by description, which has the address and the shape. The driver is looked up at run time, so nothing
// links it; it needs no GPU to encode. Throws std::runtime_error with the launch's shapes where there is no driver or
// it refuses.
std::vector<unsigned char> encoded_params(const Launch& launch);

}  // namespace tdc
