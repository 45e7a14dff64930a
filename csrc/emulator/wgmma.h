#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <string>
#include <vector>

namespace tdc::emulator {

// One operand of wgmma in shared memory, as the hardware decodes its descriptor (cuda/device_sm90.cuh): the extent
// outside of k is `rows`, k has 16 elements of 2 bytes.
struct Operand {
  unsigned long long descriptor;
  bool outer;  // k is the outer dimension

  // "" or what is wrong with the descriptor.
  std::string wrong() const;
  // The window address of row `row` at k: 16 bytes from there on hold 8 neighbours along the inner dimension, if the
  // inner coordinate is a multiple of 8.
  unsigned address(int row, int k) const;
};

// d (64 x columns) (+)= a (64 x 16) b (16 x columns).
struct Product {
  Operand a, b;
  int columns;
  bool half, add;
};

// The products of one warp that are under way: of 16 rows. Its registers are read when the first product on them is
// issued, hold NaN until the last has been waited for, and are then written.
class Products {
 public:
  using Memory = std::function<const unsigned char*(unsigned window)>;

  // registers[lane]: where the lane's registers are. row: the first of the 16 rows of a.
  void issue(const Product& product, int row, float* const (&registers)[32]);
  void commit();
  // Carries out all but the newest groups. Returns how many groups were.
  int run(int under_way, const Memory& memory);
  bool idle() const { return open_.empty() && groups_.empty(); }

 private:
  struct Sums {
    float* registers[32];
    int columns, pending;
    std::vector<float> values;  // (16, columns)
  };
  struct Pending {
    Product product;
    int row;
    std::list<Sums>::iterator sums;
  };
  void carry_out(const Pending& pending, const Memory& memory);

  std::list<Sums> sums_;
  std::vector<Pending> open_;
  std::list<std::vector<Pending>> groups_;
};

}  // namespace tdc::emulator
