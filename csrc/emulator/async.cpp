#include "emulator/async.h"

#include <algorithm>
#include <cstring>

#include "emulator/block.h"
#include "emulator/tensor.h"

namespace tdc::emulator {
namespace {

constexpr int kRegisters = 65536, kRegisterUnit = 8, kLeastRegisters = 24, kMostRegisters = 256;

using Access = RaceCheck::Access;

}  // namespace

void Async::begin_cluster(int threads, int blocks) {
  barriers_.clear();
  loads_.clear();
  prefetched_.clear();
  stores_.clear();
  warps_.clear();
  warps_.resize(static_cast<size_t>((threads + kWarp - 1) / kWarp));
  // What a compiler may give a block that has an SM for itself.
  const int registers =
      std::min(kRegisters / (threads / blocks) / kRegisterUnit * kRegisterUnit, kMostRegisters - kRegisterUnit);
  for (Warp& warp : warps_) warp.registers = registers;
  free_registers_.assign(static_cast<size_t>(blocks), 0);
  waiting_for_registers_.clear();
}

// Barriers. An access to one is an atomic access to its 8 bytes, so that its init must be ordered before.

void Async::init_barrier(const Site& site, void* barrier, int count) {
  block.check_shared(site, barrier, 8, 8);
  block.note(barrier, 8, Access::kWrite, __builtin_return_address(0));
  if (count < 1) block.fail(site, "a barrier counts at least one arrival, not " + std::to_string(count));
  Barrier& made = barriers_[reinterpret_cast<uintptr_t>(barrier)];
  made = Barrier();
  made.count = made.pending = count;
  made.thread = block.current_->number;
  made.lane = block.races_.add_lane("a copy for " + block.place_in_shared(barrier));
}

void Async::fence_barriers() {
  for (auto& [address, barrier] : barriers_) {
    if (barrier.thread == block.current_->number) barrier.fenced = true;
  }
  fence();
}

Async::Barrier& Async::barrier_of(const Site& site, void* barrier) {
  const auto found = barriers_.find(reinterpret_cast<uintptr_t>(barrier));
  if (found == barriers_.end()) block.fail(site, "no mbarrier_init made " + block.place_in_shared(barrier));
  return found->second;
}

void Async::arrive(const Site& site, void* barrier, int bytes) {
  block.note(barrier, 8, Access::kAtomic, __builtin_return_address(0));
  Barrier& at = barrier_of(site, barrier);
  if (at.pending == 0) {
    block.fail(site,
               "more than " + std::to_string(at.count) + " arrivals in a phase of " + block.place_in_shared(barrier));
  }
  block.races_.release(block.current_->number, at.arrived);
  at.expected_bytes += bytes;
  --at.pending;
  complete(at);
}

void Async::complete(Barrier& at) {
  if (at.pending || at.expected_bytes) return;
  ++at.phase;
  at.pending = at.count;
  at.done = at.arrived;
  for (int t = at.waiting.first(); t >= 0; t = at.waiting.first(t + 1)) block.wake(t);
  at.waiting.clear();
}

void Async::wait(const Site& site, void* barrier, unsigned parity) {
  block.note(barrier, 8, Access::kAtomic, __builtin_return_address(0));
  Barrier& at = barrier_of(site, barrier);
  while ((at.phase & 1) == parity) {
    at.waiting.insert(block.current_->number);
    block.current_->waits_for = barrier;
    block.wait(Thread::State::kMbarrier, site);
  }
  block.races_.acquire(block.current_->number, at.done);
}

std::string Async::missing(const void* barrier) const {
  const Barrier& at = barriers_.at(reinterpret_cast<uintptr_t>(barrier));
  return "for " + block.place_in_shared(barrier) + " (phase " + std::to_string(at.phase) + ": " +
         std::to_string(at.pending) + " of " + std::to_string(at.count) + " arrivals and " +
         std::to_string(at.expected_bytes) + " bytes missing)";
}

void Async::fence() { block.races_.fence(block.current_->number); }

// The copy engine.

TensorMap Async::decoded_map(const Site& site, const TensorMap* map, int dimensions) {
  TensorMap decoded;
  if (!decode(*map, decoded)) {
    block.fail(site, "no encoded tensor map: its place is not among those of the launch's tensor_maps");
  }
  if (dimensions && decoded.dimensions != dimensions) {
    block.fail(site, std::to_string(dimensions) + " coordinates for a tensor map of " +
                         std::to_string(decoded.dimensions) + " dimensions");
  }
  return decoded;
}

Async::Box Async::box_of(const Site& site, const TensorMap* map, const void* shared, const int* at, int dimensions) {
  const TensorMap decoded = decoded_map(site, map, dimensions);
  block.check_shared(site, shared, static_cast<size_t>(box_bytes(decoded)), 128);
  return {decoded,
          static_cast<unsigned char*>(const_cast<void*>(shared)),
          block.window_of(site, shared),
          block.rank(),
          std::vector<int>(at, at + dimensions),
          0};
}

void Async::load(const Site& site, void* to, const TensorMap* map, void* barrier, const int* at, int dimensions) {
  const void* place = __builtin_return_address(0);
  const int thread = block.current_->number;
  block.note(barrier, 8, Access::kAtomic, place);
  Barrier& signalled = barrier_of(site, barrier);
  if (!signalled.fenced) block.fail(site, "no mbarrier_init_fence after the init of " + block.place_in_shared(barrier));
  Box box = box_of(site, map, to, at, dimensions);
  prefetched_[box.rank].erase({map, box.at});
  box.clock = block.races_.next_operation(signalled.lane);
  const auto bytes = static_cast<size_t>(box_bytes(box.map));
  if (!block.races_.async_access(thread, signalled.lane, box.clock, to, bytes, Access::kWrite, place)) {
    block.fail(block.races_.wrong());
  }
  for_each_chunk(box.map, at, box.window, [&](unsigned, uintptr_t global) {
    if (global) block.note(reinterpret_cast<const void*>(global), 16, Access::kRead, place);
  });
  std::memset(to, kPoison, bytes);
  loads_.push_back({box, barrier});
}

void Async::prefetch(const Site& site, const TensorMap* map, const int* at, int dimensions) {
  decoded_map(site, map, dimensions);
  prefetched_[block.rank()].insert({map, std::vector<int>(at, at + dimensions)});
}

bool Async::deliver() {
  if (loads_.empty()) return false;
  deliver(0);
  return true;
}

void Async::deliver(size_t i) {
  const Load load = loads_[i];
  loads_.erase(loads_.begin() + static_cast<std::ptrdiff_t>(i));
  const Box& box = load.box;
  for_each_chunk(box.map, box.at.data(), box.window, [&](unsigned shared, uintptr_t global) {
    unsigned char* to = box.shared + (shared - box.window);
    if (global) {
      std::memcpy(to, reinterpret_cast<const void*>(global), 16);
    } else {
      std::memset(to, 0, 16);
    }
  });
  const int bytes = box_bytes(box.map);
  block.races_.finish_write(box.shared, static_cast<size_t>(bytes));
  Barrier& at = barriers_.at(reinterpret_cast<uintptr_t>(load.barrier));
  block.races_.add(at.arrived, at.lane, box.clock);
  at.expected_bytes -= bytes;
  complete(at);
}

void Async::take_turn(Schedule& schedule) {
  while (!loads_.empty()) {
    const int chosen = schedule.copy_to_deliver(static_cast<int>(loads_.size()));
    if (chosen < 0) return;
    deliver(static_cast<size_t>(chosen));
  }
}

void Async::store(const Site& site, const TensorMap* map, const void* from, const int* at, int dimensions) {
  const void* place = __builtin_return_address(0);
  const int thread = block.current_->number;
  Stores& own = stores_[thread];
  if (own.lane < 0) own.lane = block.races_.add_lane("a store of thread " + std::to_string(thread));
  Box box = box_of(site, map, from, at, dimensions);
  box.clock = block.races_.next_operation(own.lane);
  const auto bytes = static_cast<size_t>(box_bytes(box.map));
  if (!block.races_.async_access(thread, own.lane, box.clock, from, bytes, Access::kRead, place)) {
    block.fail(block.races_.wrong());
  }
  for_each_chunk(box.map, at, box.window, [&](unsigned, uintptr_t global) {
    if (global) block.note(reinterpret_cast<const void*>(global), 16, Access::kWrite, place);
  });
  own.open.push_back(std::move(box));
}

void Async::commit_stores() {
  Stores& own = stores_[block.current_->number];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

void Async::wait_for_reads(int unread) {
  const int thread = block.current_->number;
  Stores& own = stores_[thread];
  for (; own.groups.size() > static_cast<size_t>(unread); own.groups.pop_front()) {
    for (const Box& box : own.groups.front()) {
      for_each_chunk(box.map, box.at.data(), box.window, [&](unsigned shared, uintptr_t global) {
        if (global) std::memcpy(reinterpret_cast<void*>(global), box.shared + (shared - box.window), 16);
      });
      block.races_.acquire(thread, own.lane, box.clock);
    }
  }
}

// Products. A warp issues those of its own 16 rows, since only its lanes are sure to be in step.

Async::Warp& Async::warp() { return warps_[static_cast<size_t>(block.current_->number / kWarp)]; }

struct Multiply {
  const Site* site;
  Product product;
  float* d;
  const void* place;

  static void all(void* const* operands, int) {
    const auto& first = *static_cast<const Multiply*>(operands[0]);
    float* registers[32];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& own = *static_cast<const Multiply*>(operands[lane]);
      const Product &mine = own.product, &other = first.product;
      if (mine.a.descriptor != other.a.descriptor || mine.b.descriptor != other.b.descriptor || mine.add != other.add) {
        block.fail(*own.site, "the lanes of a warp give different operands");
      }
      registers[lane] = own.d;
    }
    block.async_.issue(first, registers);
  }
};

void Async::multiply(const Site& site, const Product& product, float* d) {
  Multiply own{&site, product, d, __builtin_return_address(0)};
  block.whole_warp_collective(site, Multiply::all, &own);
}

void Async::issue(const Multiply& given, float* const (&registers)[32]) {
  Warp& own = warp();
  const int thread = block.current_->number / kWarp * kWarp, row = thread / kWarp % 4 * 16;
  if (!own.fenced) block.fail(*given.site, "no wgmma_fence since the registers could last be touched");
  if (own.lane < 0) own.lane = block.races_.add_lane("a product of warp " + std::to_string(thread / kWarp));
  const uint32_t clock = block.races_.next_operation(own.lane);
  const Product& product = given.product;
  const auto read = [&](const Operand& operand, int first, int rows) {
    const std::string wrong = operand.wrong();
    if (!wrong.empty()) block.fail(*given.site, "a descriptor is wrong: " + wrong);
    for (int r = 0; r < rows; r += operand.outer ? 8 : 1) {
      for (int k = 0; k < 16; k += operand.outer ? 1 : 8) {
        const unsigned char* at = block.pointer_to(*given.site, operand.address(first + r, k), 16);
        if (!block.races_.async_access(thread, own.lane, clock, at, 16, Access::kRead, given.place)) {
          block.fail(block.races_.wrong());
        }
      }
    }
  };
  read(product.a, row, 16);
  read(product.b, 0, product.columns);
  own.products.issue(product, row, registers);
}

void Async::fence_products(const Site& site) {
  block.whole_warp_collective(site, [](void* const*, int) { block.async_.warp().fenced = true; }, nullptr);
}

void Async::commit_products(const Site& site) {
  block.whole_warp_collective(
      site,
      [](void* const*, int) {
        Warp& own = block.async_.warp();
        own.products.commit();
        own.clocks.push_back(block.races_.last_operation(own.lane));
      },
      nullptr);
}

void Async::wait_for_products(const Site& site, int under_way) {
  struct Own {
    const Site* site;
    int under_way;
  } given{&site, under_way};
  block.whole_warp_collective(
      site,
      [](void* const* operands, int) {
        const Own& given = *static_cast<const Own*>(operands[0]);
        Warp& own = block.async_.warp();
        const int done = own.products.run(given.under_way,
                                          [&](unsigned window) { return block.pointer_to(*given.site, window, 16); });
        own.fenced = false;
        if (done == 0) return;
        const uint32_t clock = own.clocks[static_cast<size_t>(done - 1)];
        own.clocks.erase(own.clocks.begin(), own.clocks.begin() + done);
        const int first = block.current_->number / kWarp * kWarp;
        for (int t = first; t < first + kWarp; ++t) block.races_.acquire(t, own.lane, clock);
      },
      &given);
}

// Registers.

void Async::give_registers(const Site& site, int registers) {
  Warp& own = warp();
  if (registers < kLeastRegisters || registers % kRegisterUnit) {
    block.fail(site, std::to_string(registers) + " registers: give a multiple of 8 from 24 on");
  }
  block.whole_warp_collective(site, [](void* const*, int) {}, nullptr);
  if (block.lane() != 0) return;
  if (registers > own.registers) {
    block.fail(
        site, "gives up registers to have " + std::to_string(registers) + ", but has " + std::to_string(own.registers));
  }
  free_registers_[static_cast<size_t>(block.rank())] += (own.registers - registers) * kWarp;
  own.registers = registers;
  for (int t = waiting_for_registers_.first(); t >= 0; t = waiting_for_registers_.first(t + 1)) block.wake(t);
  waiting_for_registers_.clear();
}

void Async::take_registers(const Site& site, int registers) {
  Warp& own = warp();
  if (registers >= kMostRegisters || registers % kRegisterUnit) {
    block.fail(site, std::to_string(registers) + " registers: take a multiple of 8 below 256");
  }
  block.whole_warp_collective(site, [](void* const*, int) {}, nullptr);
  if (block.lane() != 0) return;
  if (registers < own.registers) {
    block.fail(site,
               "takes registers to have " + std::to_string(registers) + ", but has " + std::to_string(own.registers));
  }
  int& free = free_registers_[static_cast<size_t>(block.rank())];
  while ((registers - own.registers) * kWarp > free) {
    waiting_for_registers_.insert(block.current_->number);
    block.wait(Thread::State::kRegisters, site);
  }
  free -= (registers - own.registers) * kWarp;
  own.registers = registers;
}

void Async::at_exit() {
  const int thread = block.current_->number;
  const std::string who = "thread " + std::to_string(thread) + " exits while ";
  const auto own = stores_.find(thread);
  if (own != stores_.end() && !(own->second.open.empty() && own->second.groups.empty())) {
    block.fail(who + "its stores have still to read shared memory: no bulk_wait_read<0> covered them");
  }
  if (!warp().products.idle()) block.fail(who + "products of its warp are under way");
}

void Async::at_end(int rank) {
  const auto of_block = [rank](const Load& load) { return load.box.rank == rank; };
  const auto under_way = std::count_if(loads_.begin(), loads_.end(), of_block);
  if (under_way) {
    block.fail("the block ends while " + std::to_string(under_way) + " copies to its shared memory are under way");
  }
  const auto& left = prefetched_[rank];
  if (!left.empty()) {
    block.fail("the block ends without the load of " + std::to_string(left.size()) + " boxes that it prefetched");
  }
}

}  // namespace tdc::emulator
