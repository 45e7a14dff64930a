#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "cuda/tensor_map.h"

namespace tdc::emulator {

// Does what the driver does before a launch: "", or why it would not encode a map. An encoded map is opaque to kernels.
std::string encode(TensorMap& map);
// What was encoded, false where that is none.
bool decode(const TensorMap& encoded, TensorMap& map);

// Bytes of a box in shared memory.
int box_bytes(const TensorMap& map);

// Calls visit(shared, global) for every 16 bytes of the box that begins at `at`, where they lie in shared memory from
// the box's beginning `window` on (a window address: the swizzle depends on it), and in device memory: 0 outside of the
// tensor. Sizes along the innermost dimension are multiples of 8 elements, so 16 bytes are inside or outside as a
// whole.
void for_each_chunk(const TensorMap& map, const int* at, unsigned window,
                    const std::function<void(unsigned shared, uintptr_t global)>& visit);

}  // namespace tdc::emulator
