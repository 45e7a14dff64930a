#pragma once

#include <cstdint>
#include <list>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda/tensor_map.h"
#include "emulator/races.h"
#include "emulator/schedule.h"
#include "emulator/wgmma.h"

namespace tdc::emulator {

class Block;
struct Multiply;
struct Site;

// What a Hopper block has beside its threads: mbarriers, the copy engine, the tensor cores behind wgmma, the pool of
// registers. Everything asynchronous happens as late as is allowed: a load when the schedule says so or when no thread
// can go on, a store and a product in the wait that covers them. Each unit is a lane of the race check's clocks, so
// that only a thread that has waited for it is ordered after it.
class Async {
 public:
  void begin_cluster(int threads, int blocks);

  void init_barrier(const Site& site, void* barrier, int count);
  void fence_barriers();
  void arrive(const Site& site, void* barrier, int bytes);
  void wait(const Site& site, void* barrier, unsigned parity);
  void fence();

  // A map as it was described; fails where none was encoded, or not one of so many dimensions, if these are given.
  TensorMap decoded_map(const Site& site, const TensorMap* map, int dimensions = 0);
  void load(const Site& site, void* to, const TensorMap* map, void* barrier, const int* at, int dimensions);
  // A box that the block must load later.
  void prefetch(const Site& site, const TensorMap* map, const int* at, int dimensions);
  void store(const Site& site, const TensorMap* map, const void* from, const int* at, int dimensions);
  void commit_stores();
  void wait_for_reads(int unread);

  // Collective over a warp; `d` is the running thread's own.
  void multiply(const Site& site, const Product& product, float* d);
  void fence_products(const Site& site);
  void commit_products(const Site& site);
  void wait_for_products(const Site& site, int under_way);

  void give_registers(const Site& site, int registers);
  void take_registers(const Site& site, int registers);

  // Lets one copy arrive, if any is under way.
  bool deliver();
  // Lets copies arrive as the schedule says, before it chooses the next thread.
  void take_turn(Schedule& schedule);
  // Fails if the running thread, or its block of this rank, leaves something behind.
  void at_exit();
  void at_end(int rank);
  // What a thread that waits for a barrier lacks, for the report of a deadlock.
  std::string missing(const void* barrier) const;

 private:
  struct Barrier {
    int count = 0, pending = 0, expected_bytes = 0;
    unsigned phase = 0;
    bool fenced = false;
    int thread = 0;  // that made it
    int lane = -1;
    RaceCheck::Clock arrived, done;
    ThreadSet waiting;
  };
  struct Box {
    TensorMap map;
    unsigned char* shared;
    unsigned window;  // its address
    int rank;         // of its block
    std::vector<int> at;
    uint32_t clock;  // of its lane
  };
  struct Load {
    Box box;
    void* barrier;
  };
  struct Stores {  // of a thread
    int lane = -1;
    std::vector<Box> open;
    std::list<std::vector<Box>> groups;
  };
  struct Warp {
    int lane = -1;
    bool fenced = false;
    int registers = 0;
    Products products;
    std::vector<uint32_t> clocks;  // of the committed groups
  };
  friend struct Multiply;

  void issue(const Multiply& given, float* const (&registers)[32]);
  Barrier& barrier_of(const Site& site, void* barrier);
  void complete(Barrier& at);
  void deliver(size_t i);
  Box box_of(const Site& site, const TensorMap* map, const void* shared, const int* at, int dimensions);
  Warp& warp();

  std::unordered_map<uintptr_t, Barrier> barriers_;
  std::vector<Load> loads_;
  // Boxes of each block that are prefetched and not loaded.
  std::unordered_map<int, std::set<std::pair<const TensorMap*, std::vector<int>>>> prefetched_;
  std::unordered_map<int, Stores> stores_;
  std::vector<Warp> warps_;
  std::vector<int> free_registers_;  // of each block
  ThreadSet waiting_for_registers_;
};

}  // namespace tdc::emulator
