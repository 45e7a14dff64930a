#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/async.h"
#include "emulator/fiber.h"
#include "emulator/races.h"
#include "emulator/schedule.h"

namespace tdc::emulator {

constexpr int kBarriers = 16;            // 0 is block_sync's
constexpr unsigned char kPoison = 0xFF;  // the bytes of memory that nobody wrote

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// Where in a kernel a wrapper was called, and which one.
struct Site {
  const char* operation = "";
  const char* file = "";
  int line = 0;

  bool operator==(const Site& other) const;
  bool operator!=(const Site& other) const { return !(*this == other); }
  std::string text() const;
};

// One asynchronous copy under way: the bytes were read at issue and are written at delivery.
struct Copy {
  unsigned char* destination;
  unsigned bytes;
  alignas(16) unsigned char data[16];
};

// One CUDA thread.
struct Thread {
  Thread(unsigned char* stack, size_t bytes) : fiber(stack, bytes) {}

  enum class State { kReady, kWarp, kBarrier, kCluster, kMbarrier, kRegisters, kDone };

  Fiber fiber;
  int number = 0;  // in the cluster
  State state = State::kReady;
  Site site;                         // of the wait
  int barrier = 0;                   // waited at: an index of the cluster's
  unsigned arrived = 0, waited = 0;  // phases of the cluster's barrier that it has arrived in, and waited for
  const void* waits_for = nullptr;   // an mbarrier
  std::vector<Copy> copies;
  std::vector<unsigned> groups;  // copies per committed group, oldest first
  unsigned open = 0;             // copies since the last commit

  int lane() const { return number % kWarp; }
};

struct Kernel {
  const char* name;
  int max_threads;  // its launch bound
  int cluster;      // blocks of a cluster
  unsigned params_bytes;
  void (*call)(const void* params);
};

// The running cluster of blocks, mostly of one: their threads, barriers and shared memory. Clusters run one after
// another; a thread runs until it has to wait, then the schedule picks the next. Threads and warps are numbered through
// the cluster, whose blocks have whole warps. What is Hopper's is in `async`.
class Block {
 public:
  // Runs every block of a grid. Returns what went wrong, or "".
  std::string run(const Kernel& kernel, const Index3& grid, int threads, size_t shared_bytes, const void* params,
                  unsigned seed);

  // For the running thread. By value and not inline: the race check would count reads of the emulator's own memory.
  Index3 thread_index() const;
  Index3 block_index() const;
  Index3 block_size() const;
  Index3 grid_size() const;
  int lane() const;

  // Waits until all lanes of the warp have given their operand; the last one calls complete(operands, lanes).
  using Complete = void (*)(void* const* operands, int lanes);
  void warp_collective(const Site& site, Complete complete, void* operand);
  // The same, of 32 lanes: fails in a block's last warp where that has fewer.
  void whole_warp_collective(const Site& site, Complete complete, void* operand);
  void barrier(const Site& site, int id, int threads, bool wait);
  void warp_sync(const Site& site);

  // Of the cluster: the running block's rank, how many there are, and their barrier.
  int rank() const;
  int blocks() const;
  void cluster_arrive(const Site& site);
  void cluster_wait(const Site& site);
  // The place in the shared memory of the block of this rank that `shared` is in the running block's.
  void* shared_of(const Site& site, const void* shared, int rank);

  // Asynchronous copies of the running thread; a wait writes all but the `in_flight` newest groups.
  void copy(const Site& site, void* shared, const void* global, unsigned bytes, bool live);
  void commit_copies();
  void wait_for_copies(int in_flight);

  // The dynamic shared memory; the static array that `key` stands for, made when first asked for.
  unsigned char* dynamic_shared() const;
  unsigned char* static_shared(const void* key, size_t bytes, const char* name);
  // The address in the window of shared memory that descriptors and the swizzle go by, of a place in the dynamic
  // shared memory; and the place of such an address.
  unsigned window_of(const Site& site, const void* shared);
  unsigned char* pointer_to(const Site& site, unsigned window, unsigned bytes);
  std::string place_in_shared(const void* address) const;
  // Fails unless the bytes lie in shared memory, at a multiple of `alignment`.
  void check_shared(const Site& site, const void* address, size_t bytes, size_t alignment);

  // Reports an access of the running thread to the race check, if that is on.
  void note(const void* address, size_t bytes, RaceCheck::Access kind, const void* place);
  __attribute__((noinline)) void note_read(const void* address, size_t bytes) {
    note(address, bytes, RaceCheck::Access::kRead, __builtin_return_address(0));
  }
  __attribute__((noinline)) void note_write(const void* address, size_t bytes) {
    note(address, bytes, RaceCheck::Access::kWrite, __builtin_return_address(0));
  }

  void device_fence() { races_.device_fence(current_->number); }

  // Ends the launch with a message. Never returns.
  [[noreturn]] void fail(const std::string& what);
  [[noreturn]] void fail(const Site& site, const std::string& what);

  Async& async() { return async_; }
  // The most multiply-adds of matrix instructions that a block, or a cluster of them, of the last launch has run.
  unsigned long long busiest() const { return busiest_; }

 private:
  friend class Async;
  friend struct Multiply;
  struct Warp {
    int arrived = 0;
    Complete complete = nullptr;
    Site site;
    int first_lane = 0;  // the first to arrive
    void* operands[kWarp] = {};
  };
  struct Barrier {
    int expected = 0;
    int arrived = 0;
    ThreadSet who, waiting;
    RaceCheck::Clock clock;  // what the arrived threads did before
  };
  struct Free {
    void operator()(unsigned char* bytes) const;
  };
  struct Shared {
    const void* key;
    size_t size;
    std::string name;
    std::unique_ptr<unsigned char, Free> bytes;
  };

  static void thread_main();
  void run_cluster(size_t shared_bytes, unsigned number);
  unsigned char* add_shared(int rank, const void* key, size_t bytes, const std::string& name);
  // The array in the shared memory of a block, made when first asked for.
  unsigned char* shared_array(int rank, const void* key, size_t bytes, const std::string& name);
  const Shared& dynamic() const { return shared_[static_cast<size_t>(rank())].front(); }
  int rank_of(int thread) const { return thread / static_cast<int>(size_.x); }
  void end_thread();
  Thread* next();
  void wait(Thread::State state, const Site& site);
  void wake(int thread);
  void release(const Site& site, int barrier);
  void complete_cluster_barrier();
  int lanes_of(int warp) const;
  std::string where() const;
  std::string stuck() const;

  const Kernel* kernel_ = nullptr;
  const void* params_ = nullptr;
  Index3 grid_, size_, first_;  // first_: the cluster's first block
  int cluster_ = 1;
  unsigned seed_ = 0;
  Schedule schedule_{0};
  Fiber* main_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
  int num_threads_ = 0;     // of the cluster
  std::vector<int> alive_;  // threads of each block
  Thread* current_ = nullptr;
  ThreadSet ready_;  // of ranks
  std::vector<Warp> warps_;
  std::vector<Barrier> barriers_;  // kBarriers for each block
  struct {
    unsigned phase = 0;
    int missing = 0;  // arrivals
    RaceCheck::Clock arrived, done;
    ThreadSet waiting;
  } cluster_barrier_;
  std::vector<std::vector<Shared>> shared_;  // of each block, the dynamic first
  RaceCheck races_;
  Async async_;
  std::string failure_;
  unsigned long long busiest_ = 0;
};

extern Block block;

}  // namespace tdc::emulator
