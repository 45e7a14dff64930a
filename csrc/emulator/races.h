#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace tdc::emulator {

// Races, whatever the schedule: two accesses of different threads to one byte, one of them a write, that no barrier
// orders. In shared memory, and in global memory within a launch, where nothing orders two blocks (so an element that
// two blocks write is a race, even if they write the same). Every access is seen, because the kernels are compiled with
// -fsanitize=thread, and races.cpp implements the functions that this inserts calls to. The method is that of
// FastTrack (Flanagan and Freund, PLDI 2009): a vector clock per thread, the last write and the reads since then per
// cell of memory. Barriers and warp_sync order memory; shuffles, ballots, ldmatrix and mma do not. A cp_async is a
// write that no thread may touch from its issue to its wait.
class RaceCheck {
 public:
  enum class Access { kRead, kWrite, kAtomic };
  using Clock = std::vector<uint32_t>;

  // Set before main where kernels were compiled for it, so constant-initialised; otherwise every call returns at once.
  static inline bool enabled = false;
  // While threads run.
  static inline bool active = false;

  // Accesses in [begin, begin + bytes), the threads' stacks, are not checked.
  void begin_launch(const void* begin, size_t bytes);
  void begin_block(int threads, unsigned number);
  void add_region(const void* begin, size_t bytes, const std::string& name);

  // Each returns false at a race, which wrong() then describes. `place` is an address in the kernel's code.
  bool access(int thread, const void* address, size_t bytes, Access kind, const void* place);
  bool issue_copy(int thread, const void* address, size_t bytes, const void* place);
  void deliver_copy(int thread, const void* address, size_t bytes);

  const std::string& wrong() const { return wrong_; }

  // Release: `clock` covers what `thread` did so far. Acquire: what `clock` covers is ordered before its next accesses.
  void release(int thread, Clock& clock);
  void acquire(int thread, const Clock& clock);

 private:
  static constexpr size_t kCell = 2;     // bytes
  static constexpr size_t kPage = 512;   // of global memory, shadowed at once
  static constexpr size_t kReaders = 4;  // remembered per cell of global memory; shared memory remembers all

  struct Record {
    const void* place = nullptr;
    uint32_t clock = 0;  // of `thread` at the access; 0: no access
    uint32_t block = 0;
    uint16_t thread = 0;
    uint8_t bytes = 0;  // bit i: byte i of the cell
    bool write = false, atomic = false;
  };
  struct Cell {
    uint64_t era = 0;  // of the records; older ones are void
    Record write;
    Record read;               // since the write, or an atomic
    std::vector<Record> more;  // such
    bool in_flight = false;
  };
  struct Region {
    uintptr_t begin = 0;
    size_t bytes = 0;
    std::string name;
    std::vector<Cell> cells;
  };

  // Whether a record is of this block, and of this thread or ordered before its current access.
  bool before(const Record& record, const Record& now) const {
    return record.block == number_ &&
           (record.thread == now.thread || record.clock <= clocks_[now.thread][record.thread]);
  }
  bool found_race(const Cell& cell, const Region* region, uintptr_t address, const Record& now, const Record& earlier);
  Region* region_of(uintptr_t address);
  Cell& shared_cell(Region& region, uintptr_t address);
  Cell& global_cell(uintptr_t address);
  bool touch(Cell& cell, const Region* region, uintptr_t address, const Record& now);
  std::string who(const Record& record) const;
  static std::string what(const Region* region, uintptr_t address);

  uint64_t era_ = 0;     // counts blocks
  uint32_t number_ = 0;  // of the block in its grid
  uintptr_t stacks_ = 0, stacks_bytes_ = 0;
  std::vector<Clock> clocks_;  // [threads][threads]
  std::vector<Region> regions_;
  size_t num_regions_ = 0;
  std::unordered_map<uintptr_t, std::vector<Cell>> pages_;
  uintptr_t last_page_ = ~uintptr_t{0};
  Cell* last_cells_ = nullptr;
  std::string wrong_;
};

// "[+0x1234]": the place's offset in this library, which addr2line makes a line of source of.
std::string place_text(const void* place);

}  // namespace tdc::emulator
