#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace tdc::emulator {

// Races on shared memory, whatever the schedule: two accesses of different threads to one byte, one of them a write,
// that no barrier orders. Every access is seen, because the kernels are compiled with -fsanitize=thread, whose calls
// races.cpp answers in place of the sanitizer's own library. The method is that of FastTrack (Flanagan and Freund,
// PLDI 2009): a vector clock per thread, the last write and the reads since then per cell of memory. Barriers and
// warp_sync order memory; shuffles, ballots, ldmatrix and mma do not. A cp_async is a write that no thread may touch
// from its issue to its wait.
class RaceCheck {
 public:
  enum class Access { kRead, kWrite, kAtomic };
  using Clock = std::vector<uint32_t>;

  // Set before main where kernels were compiled for it, so constant-initialised; else every call returns at once.
  static inline bool enabled = false;
  void begin_block(int threads);
  void end_block() { low_ = span_ = 0; }
  void add_region(const void* begin, size_t bytes, const std::string& name);

  // Whether an address may lie in a region, at the cost of one comparison.
  bool near(const void* address) const { return reinterpret_cast<uintptr_t>(address) - low_ < span_; }
  // Each returns what is wrong, or "". `place` is an address in the kernel's code.
  std::string access(int thread, const void* address, size_t bytes, Access kind, const void* place);
  std::string issue_copy(int thread, const void* address, size_t bytes, const void* place);
  void deliver_copy(int thread, const void* address, size_t bytes);

  // What `thread` did so far goes into `clock`; what `clock` holds is before what `thread` does next.
  void release(int thread, Clock& clock);
  void acquire(int thread, const Clock& clock);

 private:
  static constexpr size_t kCell = 2;  // bytes

  struct Record {
    const void* place = nullptr;
    uint32_t clock = 0;  // of `thread` at the access; 0: no access
    uint16_t thread = 0;
    uint8_t bytes = 0;  // bit i: byte i of the cell
    bool atomic = false;
  };
  struct Cell {
    uint64_t block = 0;  // the number of the block it speaks of
    Record write;
    std::vector<Record> reads;  // since the write, and atomics
    bool in_flight = false;
  };
  struct Region {
    uintptr_t begin = 0;
    size_t bytes = 0;
    std::string name;
    std::vector<Cell> cells;
  };

  bool before(const Record& record, int thread) const {
    return record.clock <= clocks_[static_cast<size_t>(thread)][record.thread];
  }
  Region* region_of(uintptr_t address);
  Cell& cell(Region& region, size_t index);
  std::string touch(Region& region, size_t index, uint8_t bytes, Access kind, Record now);
  static std::string report(const Region& region, size_t index, const char* does, const Record& now, const char* did,
                            const Record& earlier);

  uint64_t block_ = 0;
  std::vector<Clock> clocks_;  // [threads][threads]
  std::vector<Region> regions_;
  size_t num_regions_ = 0;
  uintptr_t low_ = 0, span_ = 0;
};

// "[+0x1234]": the place's offset in this library, which addr2line makes a line of source of.
std::string place_text(const void* place);

}  // namespace tdc::emulator
