#include "emulator/tensor.h"

#include <cstring>

namespace tdc::emulator {
namespace {

constexpr int kChunk = 8;  // elements in 16 bytes
constexpr unsigned kRowBytes = 128;
constexpr unsigned long long kEncoded = 0x70616D656E636F64, kHidden = 0xA5A5A5A5A5A5A5A5;

// Hides or shows a map's fields but the mark.
void hide(TensorMap& map) {
  unsigned long long words[sizeof(TensorMap) / 8];
  const unsigned long long mark = map.reserved[0];
  std::memcpy(words, &map, sizeof(map));
  for (unsigned long long& word : words) word ^= kHidden;
  std::memcpy(&map, words, sizeof(map));
  map.reserved[0] = mark;
}

// "" or why the driver would not encode a map. Strides need not be multiples of each other: docs/design/hopper.md.
std::string wrong_with(const TensorMap& map) {
  const auto say = [](const char* what, unsigned long long value) {
    return std::string("the tensor map's ") + what + " is " + std::to_string(value);
  };
  if (map.dimensions < 3 || map.dimensions > TensorMap::kMostDimensions) {
    return say("number of dimensions", static_cast<unsigned long long>(map.dimensions));
  }
  if (map.address == 0 || map.address % 16) return say("address", map.address);
  if (map.box[0] != kRowBytes / 2) return say("innermost box", map.box[0]) + ", not 64: rows of 128 bytes";
  if (map.sizes[0] % kChunk) return say("innermost size", map.sizes[0]) + ", not a multiple of 8";
  for (int d = 0; d < map.dimensions; ++d) {
    if (map.sizes[d] == 0) return say("size", 0);
    if (map.box[d] == 0 || map.box[d] > 256) return say("box", map.box[d]);
    if (d > 0 && (map.strides[d - 1] % 16 || map.strides[d - 1] >> 40)) return say("stride", map.strides[d - 1]);
  }
  return "";
}

}  // namespace

std::string encode(TensorMap& map) {
  const std::string wrong = wrong_with(map);
  if (!wrong.empty()) return wrong;
  map.reserved[0] = kEncoded;
  hide(map);
  return "";
}

bool decode(const TensorMap& encoded, TensorMap& map) {
  map = encoded;
  if (map.reserved[0] != kEncoded) return false;
  hide(map);
  return true;
}

int box_bytes(const TensorMap& map) {
  unsigned elements = 1;
  for (int d = 0; d < map.dimensions; ++d) elements *= map.box[d];
  return static_cast<int>(2 * elements);
}

void for_each_chunk(const TensorMap& map, const int* at, unsigned window,
                    const std::function<void(unsigned shared, uintptr_t global)>& visit) {
  const unsigned rows = static_cast<unsigned>(box_bytes(map)) / kRowBytes;
  for (unsigned row = 0; row < rows; ++row) {
    bool inside = true;
    unsigned long long global = map.address;
    unsigned rest = row;
    for (int d = 1; d < map.dimensions; ++d) {
      const long long coordinate = static_cast<long long>(at[d]) + rest % map.box[d];
      rest /= map.box[d];
      inside = inside && coordinate >= 0 && coordinate < map.sizes[d];
      global += static_cast<unsigned long long>(coordinate) * map.strides[d - 1];
    }
    for (unsigned chunk = 0; chunk < kRowBytes / 16; ++chunk) {
      const long long channel = static_cast<long long>(at[0]) + chunk * kChunk;
      const unsigned shared = window + row * kRowBytes + chunk * 16;
      const bool exists = inside && channel >= 0 && channel < map.sizes[0];
      visit(shared ^ (shared >> 3 & 0x70),
            exists ? static_cast<uintptr_t>(global + static_cast<unsigned long long>(channel) * 2) : 0);
    }
  }
}

}  // namespace tdc::emulator
