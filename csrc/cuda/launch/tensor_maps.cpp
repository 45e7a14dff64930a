#include "cuda/launch/tensor_maps.h"

#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "cuda/tensor_map.h"

namespace tdc {
namespace {

constexpr size_t kMostRemembered = 4096;

// cuTensorMapEncodeTiled, from CUDA 12.0 on, with the values of its enumerations that are used (cuda.h).
using Encode = int (*)(void* map, int data_type, uint32_t rank, void* address, const uint64_t* sizes,
                       const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, int interleave,
                       int swizzle, int l2_promotion, int fill);
constexpr int kFloat16 = 6, kBfloat16 = 9, kInterleaveNone = 0, kSwizzle128 = 3, kPromote128 = 2, kFillZeros = 0;

Encode driver_encode() {
  static const Encode found = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    return driver ? reinterpret_cast<Encode>(dlsym(driver, "cuTensorMapEncodeTiled")) : nullptr;
  }();
  return found;
}

struct alignas(64) Encoded {
  unsigned char bytes[sizeof(TensorMap)];
};

Encoded encode(const TensorMap& map, const Launch& launch) {
  const Encode call = driver_encode();
  const std::string where = "; kernel " + launch.kernel + ", for " + launch.shapes;
  if (!call) throw std::runtime_error("no driver with cuTensorMapEncodeTiled (CUDA 12.0 or newer)" + where);
  const auto rank = static_cast<uint32_t>(map.dimensions);
  uint64_t sizes[TensorMap::kMostDimensions], strides[TensorMap::kMostDimensions];
  uint32_t box[TensorMap::kMostDimensions], ones[TensorMap::kMostDimensions];
  for (uint32_t d = 0; d < rank; ++d) {
    sizes[d] = map.sizes[d], box[d] = map.box[d], ones[d] = 1;
    if (d > 0) strides[d - 1] = map.strides[d - 1];
  }
  Encoded made{};
  const int status = call(made.bytes, map.half ? kFloat16 : kBfloat16, rank, reinterpret_cast<void*>(map.address),
                          sizes, strides, box, ones, kInterleaveNone, kSwizzle128, kPromote128, kFillZeros);
  if (status) throw std::runtime_error("cuTensorMapEncodeTiled failed: error " + std::to_string(status) + where);
  return made;
}

Encoded remembered(const unsigned char* description, const Launch& launch) {
  static std::mutex mutex;
  static std::unordered_map<std::string, Encoded> known;
  const std::string key(reinterpret_cast<const char*>(description), sizeof(TensorMap));
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  TensorMap map;
  std::memcpy(&map, description, sizeof(map));
  const Encoded made = encode(map, launch);
  if (known.size() >= kMostRemembered) known.clear();
  known.emplace(key, made);
  return made;
}

}  // namespace

std::vector<unsigned char> encoded_params(const Launch& launch) {
  std::vector<unsigned char> params = launch.params;
  for (unsigned at : launch.tensor_maps) {
    if (at + sizeof(TensorMap) > params.size()) throw std::runtime_error("a tensor map lies outside of the parameters");
    const Encoded made = remembered(params.data() + at, launch);
    std::memcpy(params.data() + at, made.bytes, sizeof(made.bytes));
  }
  return params;
}

}  // namespace tdc
