// Tensor maps: what Hopper's copy engine (TMA) has to know of a tensor of which it copies boxes.
#pragma once

namespace tdc {

// A tensor of 16-bit elements in device memory and the shape of a box of it. Dimensions are numbered from the innermost
// one. A planner fills it in; a launcher for a GPU replaces it, in the parameters of the launch, by the driver's
// encoding, which has the same size and is opaque; the launcher for the emulator does so by an encoding of its own.
//
// A box in shared memory has rows of 128 bytes, its innermost extent, with 128-byte swizzle: bits 7 to 9 of an address
// are XORed into bits 4 to 6. Elements of a box that lie outside the tensor are loaded as zeros and are not stored.
struct alignas(64) TensorMap {
  static constexpr int kMostDimensions = 5;

  unsigned long long address;                       // a multiple of 16
  unsigned long long strides[kMostDimensions - 1];  // bytes between neighbours in dimensions 1, 2, ...; multiples of 16
  unsigned sizes[kMostDimensions];                  // elements; 1 past the last dimension
  unsigned box[kMostDimensions];   // elements, at most 256, the innermost 64; 1 past the last dimension
  int dimensions;                  // 3 to 5
  int half;                        // 0: bf16, 1: fp16
  unsigned long long reserved[5];  // zeros
};
static_assert(sizeof(TensorMap) == 128, "as large as the driver's encoding");

}  // namespace tdc
