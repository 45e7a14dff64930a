#include "emulator/wgmma.h"

#include <cstring>

#include "emulator/matrix.h"
#include "emulator/numbers.h"

namespace tdc::emulator {
namespace {

constexpr int kWarpRows = 16, kDepth = 16, kPerRow = 64;  // kPerRow: elements in 128 bytes

// The element of a fragment: registers 4 j .. 4 j + 3 of a lane are two columns of a row and of the row 8 below.
struct Place {
  int row, column;
};
Place place_of(int lane, int i) { return {lane / 4 + i % 4 / 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2}; }

// Where the n-th unit of the outer dimension begins: eight are adjacent, the eights are `stride` apart.
unsigned outer_offset(int n, unsigned stride) { return static_cast<unsigned>(n) / 8 * stride + n % 8 * 128; }

float value_of(unsigned short bits, bool half) { return half ? half_value(bits) : bf16_value(bits); }

// Elements [row, row + rows) x [0, 16) of an operand, as (16, rows).
void read(const Operand& operand, int row, int rows, bool half, const Products::Memory& memory, float* to) {
  const int rows_at_once = operand.outer ? 8 : 1, depth_at_once = operand.outer ? 1 : 8;
  for (int r = 0; r < rows; r += rows_at_once) {
    for (int k = 0; k < kDepth; k += depth_at_once) {
      unsigned short bits[8];
      std::memcpy(bits, memory(operand.address(row + r, k)), sizeof(bits));
      for (int i = 0; i < 8; ++i) {
        const int at_k = operand.outer ? k : k + i, at_row = operand.outer ? r + i : r;
        to[at_k * rows + at_row] = value_of(bits[i], half);
      }
    }
  }
}

}  // namespace

std::string Operand::wrong() const {
  if (descriptor >> 62 != 1) return "its layout is " + std::to_string(descriptor >> 62) + ", not 1: 128-byte swizzle";
  if (descriptor >> 49 & 7) return "its base offset is " + std::to_string(descriptor >> 49 & 7) + ", not 0";
  const unsigned leading = static_cast<unsigned>(descriptor >> 16 & 0x3FFF) * 16;
  if (leading != 16 && leading % 1024) {
    return "its leading offset is " + std::to_string(leading) +
           ", neither 16 nor a multiple of 1024: the address may have more than 18 bits";
  }
  return "";
}

unsigned Operand::address(int row, int k) const {
  const auto field = [&](int bit) { return static_cast<unsigned>(descriptor >> bit & 0x3FFF) * 16; };
  const unsigned start = field(0), leading = field(16), stride = field(32);
  unsigned at = start;
  if (outer) {
    at += static_cast<unsigned>(row / kPerRow) * leading + outer_offset(k, stride) +
          static_cast<unsigned>(row % kPerRow) * 2;
  } else {
    at += outer_offset(row, stride) + static_cast<unsigned>(k) * 2;
  }
  return at ^ (at >> 3 & 0x70);  // bits 7 to 9 into 4 to 6
}

void Products::issue(const Product& product, int row, float* const (&registers)[32]) {
  auto sums = sums_.begin();
  while (sums != sums_.end() && sums->registers[0] != registers[0]) ++sums;
  if (sums == sums_.end()) {
    sums = sums_.insert(sums_.end(), Sums());
    std::memcpy(sums->registers, registers, sizeof(registers));
    sums->columns = product.columns;
    sums->values.resize(static_cast<size_t>(kWarpRows * product.columns));
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < product.columns / 2; ++i) {
        const Place at = place_of(lane, i);
        sums->values[static_cast<size_t>(at.row * product.columns + at.column)] = registers[lane][i];
        registers[lane][i] = float_of_bits(0xFFFFFFFFu);
      }
    }
  }
  ++sums->pending;
  open_.push_back({product, row, sums});
}

void Products::commit() {
  groups_.push_back(std::move(open_));
  open_.clear();
}

int Products::run(int under_way, const Memory& memory) {
  int done = 0;
  for (; groups_.size() > static_cast<size_t>(under_way); ++done) {
    for (const Pending& pending : groups_.front()) carry_out(pending, memory);
    groups_.pop_front();
  }
  return done;
}

void Products::carry_out(const Pending& pending, const Memory& memory) {
  const Product& p = pending.product;
  Sums& sums = *pending.sums;
  const auto columns = static_cast<size_t>(p.columns);
  float a[kDepth * kWarpRows];
  std::vector<float> b(kDepth * columns);
  read(p.a, pending.row, kWarpRows, p.half, memory, a);
  read(p.b, 0, p.columns, p.half, memory, b.data());
  count_multiply_adds(kWarpRows * kDepth * p.columns);
  if (!p.add) std::fill(sums.values.begin(), sums.values.end(), 0.0f);
  for (size_t row = 0; row < kWarpRows; ++row) {
    float* to = sums.values.data() + row * columns;
    for (size_t k = 0; k < kDepth; ++k) {
      const float factor = a[k * kWarpRows + row];
      const float* from = b.data() + k * columns;
      for (size_t n = 0; n < columns; ++n) to[n] += factor * from[n];
    }
  }
  if (--sums.pending) return;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < p.columns / 2; ++i) {
      const Place at = place_of(lane, i);
      sums.registers[lane][i] = sums.values[static_cast<size_t>(at.row * p.columns + at.column)];
    }
  }
  sums_.erase(pending.sums);
}

}  // namespace tdc::emulator
