// What a launch planner returns: everything that starts one kernel, as plain data. It needs no CUDA: any host
// compiler builds it. It is run by the kernels built ahead of time, by NVRTC through Python, or by the emulator.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace tdc {

// The GPU that a launch is planned for.
struct Device {
  int arch;             // compute capability * 10: 80, 90, 100
  int multiprocessors;  // number of SMs
  int shared_limit;     // bytes of shared memory that one block may opt in to
};

// One kernel launch. Grid entries are at least 1; where there is nothing to do, a planner returns no launch.
struct Launch {
  std::string kernel;                 // extern "C" name
  unsigned grid[3];                   // blocks in x, y, z
  unsigned threads;                   // per block, all in x
  unsigned shared_bytes;              // dynamic shared memory
  std::vector<unsigned char> params;  // the kernel's one parameter struct, byte for byte
  std::string shapes;                 // for error messages, such as "x (8, 64, 32, 32) bf16, weight (4, 64, 64, 3, 3)"
  std::vector<unsigned>
      tensor_maps;  // where in `params` there are descriptions (TensorMap) for a GPU's driver to encode
};

// A parameter struct as the bytes that the kernel receives. The padding is made zeros where the compiler can do so:
// then equal parameters have equal bytes, without which no launch is known to be repeatable
// (tdc_fast/ops/cuda_planned.py). gcc (12) does so wrongly in arrays of structs, so that P must have none.
template <class P>
std::vector<unsigned char> bytes_of(P params) {
  static_assert(std::is_trivially_copyable<P>::value, "kernel parameters are plain data");
#if defined(__has_builtin)
#if __has_builtin(__builtin_clear_padding)
  __builtin_clear_padding(&params);
#endif
#endif
  std::vector<unsigned char> bytes(sizeof(P));
  std::memcpy(bytes.data(), &params, sizeof(P));
  return bytes;
}

}  // namespace tdc
