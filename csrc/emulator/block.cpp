#include "emulator/block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "emulator/matrix.h"

namespace tdc::emulator {

Block block;

namespace {

// Sanitized frames are several times as large.
constexpr size_t kStackBytes = TDC_EMULATOR_ASAN ? 512 << 10 : 128 << 10;

std::string number_text(const Index3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

// "0-31, 64" of an ascending list.
std::string ranges(const std::vector<int>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (j > i) text += "-" + std::to_string(numbers[j]);
    i = j + 1;
  }
  return text;
}

}  // namespace

bool Site::operator==(const Site& other) const {
  return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0) &&
         std::strcmp(operation, other.operation) == 0;
}

std::string Site::text() const {
  const char* slash = std::strrchr(file, '/');
  return std::string(operation) + " at " + (slash ? slash + 1 : file) + ":" + std::to_string(line);
}

Index3 Block::thread_index() const { return {static_cast<unsigned>(current_->number) % size_.x, 0, 0}; }
Index3 Block::block_index() const { return {first_.x, first_.y + static_cast<unsigned>(rank()), first_.z}; }
Index3 Block::block_size() const { return size_; }
Index3 Block::grid_size() const { return grid_; }
int Block::lane() const { return current_->lane(); }
int Block::blocks() const { return cluster_; }
int Block::rank() const { return cluster_ == 1 ? 0 : rank_of(current_->number); }

std::string Block::run(const Kernel& kernel, const Index3& grid, int threads, size_t shared_bytes, const void* params,
                       unsigned seed) {
  Fiber caller;
  kernel_ = &kernel;
  params_ = params;
  grid_ = grid;
  size_ = {static_cast<unsigned>(threads), 1, 1};
  seed_ = seed;
  schedule_ = Schedule(seed);
  main_ = &caller;
  cluster_ = kernel.cluster;
  num_threads_ = threads * cluster_;
  failure_.clear();
  busiest_ = 0;
  // For this launch alone: every stack is two of the process's mappings, of which the system allows 65530, and a
  // process may hold many libraries, each with a block of its own.
  const Stacks stacks(static_cast<size_t>(num_threads_), kStackBytes);
  for (size_t t = 0; t < static_cast<size_t>(num_threads_); ++t) {
    threads_.push_back(std::make_unique<Thread>(stacks.stack(t), kStackBytes));
  }
  races_.begin_launch(stacks.begin(), stacks.size());
  const auto along = static_cast<unsigned>(cluster_), rows = grid.y / along;
  for (unsigned c : schedule_.block_order(grid.x * rows * grid.z)) {
    first_ = {c % grid.x, c / grid.x % rows * along, c / grid.x / rows};
    const unsigned long long before = multiply_adds();
    run_cluster(shared_bytes, c);
    busiest_ = std::max(busiest_, multiply_adds() - before);
    if (!failure_.empty()) break;
  }
  shared_.clear();
  threads_.clear();
  main_ = nullptr;
  return failure_;
}

void Block::run_cluster(size_t shared_bytes, unsigned number) {
  const auto blocks = static_cast<size_t>(cluster_);
  schedule_.arrange_threads(num_threads_);
  races_.begin_cluster(num_threads_, cluster_, number);
  shared_.clear();
  shared_.resize(blocks);
  for (int rank = 0; rank < cluster_; ++rank) add_shared(rank, nullptr, shared_bytes, "the dynamic shared memory");
  warps_.assign(static_cast<size_t>((num_threads_ + kWarp - 1) / kWarp), Warp());
  barriers_.assign(blocks * kBarriers, Barrier());
  cluster_barrier_ = {};
  cluster_barrier_.missing = num_threads_;
  async_.begin_cluster(num_threads_, cluster_);
  ready_.clear();
  alive_.assign(blocks, static_cast<int>(size_.x));
  for (int t = 0; t < num_threads_; ++t) {
    Thread& thread = *threads_[static_cast<size_t>(t)];
    thread.number = t;
    thread.arrived = thread.waited = 0;
    thread.copies.clear();
    thread.groups.clear();
    thread.open = 0;
    thread.fiber.prepare(&Block::thread_main);
    wake(t);
  }
  current_ = next();
  RaceCheck::active = RaceCheck::enabled;
  main_->switch_to(current_->fiber);
  current_ = nullptr;
  RaceCheck::active = false;
  if (!failure_.empty()) return;
  if (std::accumulate(alive_.begin(), alive_.end(), 0) > 0) {
    failure_ = stuck();
  } else if (!races_.remote_accesses_end_in_time()) {
    failure_ = races_.wrong() + where();
  }
}

void Block::thread_main() {
  block.kernel_->call(block.params_);
  block.async_.at_exit();
  block.end_thread();
  Thread& self = *block.current_;
  block.current_ = block.next();
  self.fiber.leave_for(block.current_ ? block.current_->fiber : *block.main_);
}

// What is left of a block that ends is NaN for others of its cluster.
void Block::end_thread() {
  Thread& self = *current_;
  const int own = rank();
  if (--alive_[static_cast<size_t>(own)] == 0) {
    async_.at_end(own);
    if (cluster_ > 1) {
      for (const Shared& shared : shared_[static_cast<size_t>(own)]) {
        std::memset(shared.bytes.get(), kPoison, shared.size);
      }
    }
  }
  self.state = Thread::State::kDone;
  ready_.erase(schedule_.rank_of(self.number));
  if (self.arrived == cluster_barrier_.phase && --cluster_barrier_.missing == 0) complete_cluster_barrier();
}

Thread* Block::next() {
  async_.take_turn(schedule_);
  const int start = schedule_.start(num_threads_);
  int rank = ready_.first(start);
  if (rank < 0 && start > 0) rank = ready_.first();
  while (rank < 0 && async_.deliver()) rank = ready_.first();
  return rank < 0 ? nullptr : threads_[static_cast<size_t>(schedule_.thread_at(rank))].get();
}

void Block::wake(int thread) {
  threads_[static_cast<size_t>(thread)]->state = Thread::State::kReady;
  ready_.insert(schedule_.rank_of(thread));
}

void Block::wait(Thread::State state, const Site& site) {
  Thread& self = *current_;
  self.state = state;
  self.site = site;
  ready_.erase(schedule_.rank_of(self.number));
  current_ = next();
  if (current_ == &self) return;  // a copy that it waited for has just arrived
  self.fiber.switch_to(current_ ? current_->fiber : *main_);
}

void Block::fail(const Site& site, const std::string& what) {
  fail(site.text() + ", thread " + std::to_string(thread_index().x) + ": " + what);
}

void Block::fail(const std::string& what) {
  failure_ = what + where();
  Thread& self = *current_;
  self.fiber.leave_for(*main_);
  std::abort();
}

int Block::lanes_of(int warp) const { return std::min(kWarp, num_threads_ - warp * kWarp); }

void Block::warp_collective(const Site& site, Complete complete, void* operand) {
  Thread& self = *current_;
  const int number = self.number / kWarp;
  Warp& warp = warps_[static_cast<size_t>(number)];
  if (warp.arrived == 0) {
    warp.complete = complete;
    warp.site = site;
    warp.first_lane = self.lane();
  } else if (warp.complete != complete || warp.site != site) {
    fail(site, "divergence in warp " + std::to_string(number) + ": lane " + std::to_string(self.lane()) +
                   " came here while lane " + std::to_string(warp.first_lane) + " waits for its warp in " +
                   warp.site.text());
  }
  warp.operands[self.lane()] = operand;
  const int lanes = lanes_of(number);
  if (++warp.arrived < lanes) {
    wait(Thread::State::kWarp, site);
    return;
  }
  complete(warp.operands, lanes);
  warp.arrived = 0;
  for (int lane = 0; lane < lanes; ++lane) wake(number * kWarp + lane);
}

void Block::whole_warp_collective(const Site& site, Complete complete, void* operand) {
  const int lanes = lanes_of(current_->number / kWarp);
  if (lanes < kWarp) fail(site, "needs a whole warp; this one has " + std::to_string(lanes) + " lanes");
  warp_collective(site, complete, operand);
}

void Block::warp_sync(const Site& site) {
  warp_collective(
      site,
      [](void* const*, int lanes) {
        const int first = block.current_->number / kWarp * kWarp;
        RaceCheck::Clock clock;
        for (int t = first; t < first + lanes; ++t) block.races_.release(t, clock);
        for (int t = first; t < first + lanes; ++t) block.races_.acquire(t, clock);
      },
      nullptr);
}

void Block::copy(const Site& site, void* shared, const void* global, unsigned bytes, bool live) {
  check_shared(site, shared, bytes, bytes);
  const void* place = __builtin_return_address(0);
  if (live) note(global, bytes, RaceCheck::Access::kRead, place);
  if (!races_.issue_copy(current_->number, shared, bytes, place)) fail(races_.wrong());
  Copy made{static_cast<unsigned char*>(shared), bytes, {}};
  if (live) std::memcpy(made.data, global, bytes);
  std::memset(shared, kPoison, bytes);
  current_->copies.push_back(made);
  ++current_->open;
}

void Block::commit_copies() {
  current_->groups.push_back(current_->open);
  current_->open = 0;
}

void Block::wait_for_copies(int in_flight) {
  std::vector<Copy>& copies = current_->copies;
  std::vector<unsigned>& groups = current_->groups;
  if (groups.size() <= static_cast<size_t>(in_flight)) return;
  const auto done = static_cast<std::ptrdiff_t>(groups.size() - static_cast<size_t>(in_flight));
  const auto written = std::accumulate(groups.begin(), groups.begin() + done, std::ptrdiff_t{0});
  for (auto copy = copies.begin(); copy != copies.begin() + written; ++copy) {
    std::memcpy(copy->destination, copy->data, copy->bytes);
    races_.deliver_copy(current_->number, copy->destination, copy->bytes);
  }
  copies.erase(copies.begin(), copies.begin() + written);
  groups.erase(groups.begin(), groups.begin() + done);
}

void Block::note(const void* address, size_t bytes, RaceCheck::Access kind, const void* place) {
  if (!races_.access(current_->number, address, bytes, kind, place)) fail(races_.wrong());
}

void Block::barrier(const Site& site, int id, int threads, bool wait_here) {
  const int number = rank() * kBarriers + id, self = current_->number;
  Barrier& at = barriers_[static_cast<size_t>(number)];
  if (at.arrived == 0) at.expected = threads;
  if (at.expected != threads) {
    fail(site, "barrier " + std::to_string(id) + " was opened for " + std::to_string(at.expected) +
                   " threads; this one comes with " + std::to_string(threads));
  }
  if (at.who.contains(self)) fail(site, "came twice to barrier " + std::to_string(id) + " in one phase");
  at.who.insert(self);
  ++at.arrived;
  races_.release(self, at.clock);
  if (wait_here) {
    at.waiting.insert(self);
    current_->barrier = number;
    current_->site = site;
  }
  if (at.arrived == at.expected) {
    release(site, number);
  } else if (wait_here) {
    wait(Thread::State::kBarrier, site);
  }
}

// A warp must arrive at a barrier as a whole, from one place in the kernel.
void Block::release(const Site& site, int barrier) {
  Barrier& at = barriers_[static_cast<size_t>(barrier)];
  const int id = barrier % kBarriers;
  for (int first = at.who.first(); first >= 0; first = at.who.first((first / kWarp + 1) * kWarp)) {
    const int warp = first / kWarp;
    for (int t = warp * kWarp; t < warp * kWarp + lanes_of(warp); ++t) {
      if (!at.who.contains(t)) {
        fail(site, "divergence in warp " + std::to_string(warp) + ": lane " + std::to_string(first % kWarp) +
                       " came to barrier " + std::to_string(id) + ", lane " + std::to_string(t % kWarp) + " did not");
      }
      const Site &one = threads_[static_cast<size_t>(first)]->site, &other = threads_[static_cast<size_t>(t)]->site;
      if (at.waiting.contains(t) && at.waiting.contains(first) && one != other) {
        fail(site, "divergence in warp " + std::to_string(warp) + ": its lanes came to barrier " + std::to_string(id) +
                       " from " + one.text() + " and from " + other.text());
      }
    }
  }
  for (int t = at.waiting.first(); t >= 0; t = at.waiting.first(t + 1)) {
    races_.acquire(t, at.clock);
    wake(t);
  }
  at = Barrier();
}

// Whole warps arrive and wait. An exited thread is not waited for.
void Block::cluster_arrive(const Site& site) {
  const auto arrive = [](void* const* operands, int lanes) {
    auto& barrier = block.cluster_barrier_;
    const int first = block.current_->number / kWarp * kWarp;
    for (int t = first; t < first + lanes; ++t) {
      Thread& thread = *block.threads_[static_cast<size_t>(t)];
      if (thread.arrived != thread.waited) {
        block.fail(*static_cast<const Site*>(operands[0]),
                   "came again to the cluster's barrier without a cluster_wait");
      }
      ++thread.arrived;
      block.races_.release(t, barrier.arrived);
    }
    barrier.missing -= lanes;
    if (barrier.missing == 0) block.complete_cluster_barrier();
  };
  warp_collective(site, arrive, const_cast<Site*>(&site));
}

void Block::complete_cluster_barrier() {
  auto& at = cluster_barrier_;
  ++at.phase;
  at.missing = std::accumulate(alive_.begin(), alive_.end(), 0);
  std::swap(at.done, at.arrived);
  at.arrived.clear();
  for (int t = at.waiting.first(); t >= 0; t = at.waiting.first(t + 1)) wake(t);
  at.waiting.clear();
}

void Block::cluster_wait(const Site& site) {
  warp_collective(site, [](void* const*, int) {}, nullptr);
  Thread& self = *current_;
  if (self.arrived == self.waited) fail(site, "no cluster_arrive came before");
  ++self.waited;
  if (self.arrived > cluster_barrier_.phase) {
    cluster_barrier_.waiting.insert(self.number);
    wait(Thread::State::kCluster, site);
  }
  races_.acquire(self.number, cluster_barrier_.done);
}

std::string Block::where() const {
  return "\nin kernel " + std::string(kernel_->name) + ", block " + number_text(current_ ? block_index() : first_) +
         " of " + number_text(grid_) + ", " + std::to_string(size_.x) + " threads, schedule " + std::to_string(seed_);
}

// Which threads wait for what; threads that wait for the same thing are listed together.
std::string Block::stuck() const {
  std::vector<std::pair<std::string, std::vector<int>>> kinds;
  for (int t = 0; t < num_threads_; ++t) {
    const Thread& thread = *threads_[static_cast<size_t>(t)];
    std::string kind = "exited";
    if (thread.state == Thread::State::kWarp) {
      const int warp = t / kWarp;
      kind = "wait for warp " + std::to_string(warp) + " in " + thread.site.text() + " (" +
             std::to_string(warps_[static_cast<size_t>(warp)].arrived) + " of " + std::to_string(lanes_of(warp)) +
             " lanes came)";
    } else if (thread.state == Thread::State::kBarrier) {
      const Barrier& at = barriers_[static_cast<size_t>(thread.barrier)];
      kind = "wait at barrier " + std::to_string(thread.barrier % kBarriers) + " in " + thread.site.text() + " (" +
             std::to_string(at.arrived) + " of " + std::to_string(at.expected) + " threads came)";
    } else if (thread.state == Thread::State::kCluster) {
      kind = "wait at the cluster's barrier in " + thread.site.text() + " (" +
             std::to_string(cluster_barrier_.missing) + " threads of the cluster have not come)";
    } else if (thread.state == Thread::State::kMbarrier) {
      kind = "wait in " + thread.site.text() + " " + async_.missing(thread.waits_for);
    } else if (thread.state == Thread::State::kRegisters) {
      kind = "wait for registers in " + thread.site.text();
    }
    if (cluster_ > 1) kind = "of rank " + std::to_string(rank_of(t)) + " " + kind;
    auto same = std::find_if(kinds.begin(), kinds.end(), [&](const auto& known) { return known.first == kind; });
    if (same == kinds.end()) same = kinds.insert(kinds.end(), {kind, {}});
    same->second.push_back(t % static_cast<int>(size_.x));
  }
  std::string text = "deadlock:";
  for (const auto& [kind, numbers] : kinds) text += "\n  threads " + ranges(numbers) + " " + kind;
  return text + where();
}

}  // namespace tdc::emulator
