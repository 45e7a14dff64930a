#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace tdc::emulator {

// Races, whatever the schedule: two accesses of different threads to one byte, one of them a write, that no barrier
// orders. In shared memory, and in global memory within a launch, where only fences around atomics order two blocks (so
// an element that two blocks write is mostly a race, even if they write the same): what a thread did before a
// device_fence and then an atomic comes before what a thread of a later block does after an atomic of its own on the
// same address and then a device_fence. Every access is seen, because the kernels are compiled with
// -fsanitize=thread, and hooks.cpp implements the functions that this inserts calls to. The method is that of
// FastTrack (Flanagan and Freund, PLDI 2009): a vector clock per thread, the last write and the reads since then per
// cell of memory. Barriers and warp_sync order memory; shuffles, ballots, ldmatrix and mma do not. A cp_async is a
// write that no thread may touch from its issue to its wait.
//
// The blocks of a cluster are threads of one program, which share their clocks. What one touches in another's shared
// memory comes after something that shows that the other has begun, and before something that the other waits for.
//
// What Hopper's units do on behalf of a thread has a lane of the clocks of its own: it comes after what the thread did
// before, and only a thread that has waited for it comes after it. It sees what threads wrote only if they fenced.
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
  // `blocks` of as many threads each; threads are numbered through them.
  void begin_cluster(int threads, int blocks, unsigned number);
  // Shared memory, of the block of a rank.
  void add_region(const void* begin, size_t bytes, const std::string& name, int rank);

  // Each returns false at a race, which wrong() then describes. `place` is an address in the kernel's code.
  bool access(int thread, const void* address, size_t bytes, Access kind, const void* place);
  bool issue_copy(int thread, const void* address, size_t bytes, const void* place);
  void deliver_copy(int thread, const void* address, size_t bytes);

  // A lane for a unit that works asynchronously, or -1 where nothing is checked; `name` is for messages.
  int add_lane(const std::string& name);
  // The number of the lane's next operation, and of its last one.
  uint32_t next_operation(int lane);
  uint32_t last_operation(int lane) const;
  // An access by operation `clock` of a lane, issued by a thread. A write is in flight until it is finished.
  bool async_access(int thread, int lane, uint32_t clock, const void* address, size_t bytes, Access kind,
                    const void* place);
  void finish_write(const void* address, size_t bytes);
  // A thread's accesses to shared memory so far come before asynchronous ones after this.
  void fence(int thread);
  // The device_fence of a thread, which orders its accesses and its atomics for other blocks.
  void device_fence(int thread);
  // Operations of a lane up to `clock` are ordered before what acquires the clock, or before the thread's next
  // accesses.
  void add(Clock& clock, int lane, uint32_t operation);
  void acquire(int thread, int lane, uint32_t operation);

  // At the end of a cluster: whether what threads touched in another block's shared memory was ordered before its end.
  bool remote_accesses_end_in_time();

  const std::string& wrong() const { return wrong_; }

  // Release: `clock` covers what `thread` did so far. Acquire: what `clock` covers is ordered before its next accesses.
  void release(int thread, Clock& clock);
  void acquire(int thread, const Clock& clock);

 private:
  static constexpr size_t kCell = 2;     // bytes
  static constexpr size_t kChunk = 16;   // bytes: most accesses are of whole chunks
  static constexpr size_t kPage = 512;   // of global memory, shadowed at once
  static constexpr size_t kReaders = 4;  // remembered per cell of global memory; shared memory remembers all

  struct Record {
    const void* place = nullptr;
    uint32_t clock = 0;   // of `thread` at the access; 0: no access
    uint32_t block = 0;   // the number of its cluster
    uint16_t thread = 0;  // or lane
    uint8_t bytes = 0;    // bit i: byte i of the cell
    bool write = false, atomic = false, async = false;
  };
  struct Cell {
    Record write;
    Record read;               // since the write, or an atomic
    std::vector<Record> more;  // such
    bool in_flight = false;
  };
  // The cells of a chunk: one for all until an access is of a part.
  struct Chunk {
    uint64_t era = 0;  // of the records; older ones are void
    bool split = false;
    Cell whole;
    std::vector<Cell> parts;
  };
  // What a block had done before a fence and an atomic.
  struct Published {
    uint32_t block;
    Clock clock;
  };
  // That a thread of this block has found by an atomic and a fence, at `epoch` of its own clock.
  struct Acquired {
    Published published;
    int thread;
    uint32_t epoch;
  };
  struct Region {
    uintptr_t begin = 0;
    size_t bytes = 0;
    std::string name;
    int rank = 0;
    std::vector<Chunk> chunks;
  };

  // Whether a record is of this thread or ordered before its current access.
  bool before(const Record& record, int thread) const {
    if (record.block != number_) return acquired(record, thread);
    return record.thread == thread || record.clock <= clocks_[static_cast<size_t>(thread)][record.thread];
  }
  // The same of a record of another block.
  bool acquired(const Record& record, int thread) const;
  void publish(int thread, uintptr_t address);
  // Whether the thread that wrote has fenced since, where `thread` knows of it.
  bool fenced(const Record& written, int thread) const;
  bool touch_all(int thread, const Record& now, const void* address, size_t bytes);
  bool found_race(const Cell& cell, const Region* region, uintptr_t address, const Record& now, const Record& earlier);
  Region* region_of(uintptr_t address);
  Chunk& chunk_of(Region* region, uintptr_t address);
  // Calls visit(cell, address, bytes within the cell) for all cells of a range until it returns false. An `overwrite`
  // leaves chunks that it covers with one cell.
  template <class Visit>
  bool each_cell(uintptr_t begin, size_t bytes, bool overwrite, Visit visit);
  bool touch(Cell& cell, const Region* region, uintptr_t address, int thread, const Record& now);
  std::string who(const Record& record) const;
  static std::string what(const Region* region, uintptr_t address);

  // Whether the access of a thread to another block's shared memory is after that block has begun; noted if so.
  bool reaches(const Region& region, int thread, const Record& now);
  int rank_of(size_t thread) const { return static_cast<int>(thread / (threads_ / blocks_)); }
  std::string thread_text(size_t thread) const;

  uint64_t era_ = 0;     // counts clusters
  uint32_t number_ = 0;  // of the cluster in its grid
  uintptr_t stacks_ = 0, stacks_bytes_ = 0;
  size_t threads_ = 0, blocks_ = 1;
  std::vector<Clock> clocks_;                                        // [threads][threads + lanes]
  std::vector<std::vector<uint32_t>> fences_;                        // [threads]: own clocks, ascending
  std::unordered_map<uintptr_t, std::vector<Published>> published_;  // in this launch, by an atomic's address
  std::vector<Clock> fenced_clocks_;                                 // [threads] at the last device_fence
  std::vector<std::vector<std::pair<uintptr_t, size_t>>> found_;     // [threads] by atomics since then
  std::vector<Acquired> acquired_;                                   // by this block
  std::vector<Record> remote_;  // [threads][blocks]: the last accesses to their shared memory
  std::vector<std::string> lane_names_;
  std::vector<uint32_t> operations_;  // [lanes] so far
  std::vector<Region> regions_;
  size_t num_regions_ = 0;
  std::unordered_map<uintptr_t, std::vector<Chunk>> pages_;
  uintptr_t last_page_ = ~uintptr_t{0};
  Chunk* last_chunks_ = nullptr;
  std::string wrong_;
};

// "[+0x1234]": the place's offset in this library, which addr2line makes a line of source of.
std::string place_text(const void* place);

}  // namespace tdc::emulator
