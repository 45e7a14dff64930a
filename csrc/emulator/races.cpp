#include "emulator/races.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "emulator/block.h"

namespace tdc::emulator {

void RaceCheck::begin_launch(const void* begin, size_t bytes) {
  stacks_ = reinterpret_cast<uintptr_t>(begin);
  stacks_bytes_ = bytes;
  pages_.clear();
  published_.clear();
  last_page_ = ~uintptr_t{0};
}

void RaceCheck::begin_cluster(int threads, int blocks, unsigned number) {
  if (!enabled) return;
  ++era_;
  number_ = number;
  num_regions_ = 0;
  threads_ = static_cast<size_t>(threads);
  blocks_ = static_cast<size_t>(blocks);
  if (blocks > 1) remote_.assign(threads_ * blocks_, Record());
  clocks_.resize(threads_);
  for (size_t t = 0; t < threads_; ++t) {
    clocks_[t].assign(threads_, 0);
    clocks_[t][t] = 1;
  }
  fences_.assign(threads_, {});
  fenced_clocks_.assign(threads_, {});
  found_.assign(threads_, {});
  acquired_.clear();
  lane_names_.clear();
  operations_.clear();
}

void RaceCheck::add_region(const void* begin, size_t bytes, const std::string& name, int rank) {
  if (!enabled || bytes == 0) return;
  if (regions_.size() == num_regions_) regions_.emplace_back();
  Region& region = regions_[num_regions_++];
  region.begin = reinterpret_cast<uintptr_t>(begin);
  region.bytes = bytes;
  region.name = name;
  region.rank = rank;
  const size_t chunks = (region.begin + bytes - 1) / kChunk - region.begin / kChunk + 1;
  if (region.chunks.size() < chunks) region.chunks.resize(chunks);
}

RaceCheck::Region* RaceCheck::region_of(uintptr_t address) {
  for (size_t i = 0; i < num_regions_; ++i) {
    if (address - regions_[i].begin < regions_[i].bytes) return &regions_[i];
  }
  return nullptr;
}

RaceCheck::Chunk& RaceCheck::chunk_of(Region* region, uintptr_t address) {
  if (region == nullptr) {
    const uintptr_t page = address / kPage;
    if (page != last_page_) {
      std::vector<Chunk>& chunks = pages_[page];
      if (chunks.empty()) chunks.resize(kPage / kChunk);
      last_page_ = page;
      last_chunks_ = chunks.data();
    }
    return last_chunks_[address % kPage / kChunk];
  }
  Chunk& chunk = region->chunks[address / kChunk - region->begin / kChunk];
  if (chunk.era != era_) {
    chunk.era = era_;
    chunk.split = false;
    chunk.whole.write = Record();
    chunk.whole.read = Record();
    chunk.whole.more.clear();
    chunk.whole.in_flight = false;
  }
  return chunk;
}

template <class Visit>
bool RaceCheck::each_cell(uintptr_t begin, size_t bytes, bool overwrite, Visit visit) {
  Region* region = region_of(begin);
  const uintptr_t end = region ? std::min(begin + bytes, region->begin + region->bytes) : begin + bytes;
  constexpr uint8_t kAll = (1u << kCell) - 1;
  for (uintptr_t at = begin / kChunk * kChunk; at < end; at += kChunk) {
    Chunk& chunk = chunk_of(region, at);
    const bool covered = begin <= at && at + kChunk <= end;
    if (covered && !chunk.split) {
      if (!visit(chunk.whole, region, at, kAll)) return false;
      continue;
    }
    if (!chunk.split) {
      chunk.parts.assign(kChunk / kCell, chunk.whole);
      chunk.split = true;
    }
    const uintptr_t stop = std::min(end, at + kChunk);
    for (uintptr_t cell = std::max(begin, at) / kCell * kCell; cell < stop; cell += kCell) {
      const uintptr_t first = std::max(begin, cell), last = std::min(end, cell + kCell);
      const auto mask = static_cast<uint8_t>(((1u << (last - first)) - 1) << (first - cell));
      if (!visit(chunk.parts[(cell - at) / kCell], region, first, mask)) return false;
    }
    if (covered && overwrite) {
      chunk.whole = chunk.parts[0];
      chunk.split = false;
    }
  }
  return true;
}

std::string RaceCheck::thread_text(size_t thread) const {
  const std::string text = "thread " + std::to_string(thread % (threads_ / blocks_));
  return blocks_ == 1 ? text : text + " of rank " + std::to_string(rank_of(thread));
}

std::string RaceCheck::who(const Record& record) const {
  const bool lane = record.block == number_ && record.thread >= threads_;
  const std::string thread = lane ? lane_names_[record.thread - threads_] : thread_text(record.thread);
  return record.block == number_ ? thread : thread + " of block number " + std::to_string(record.block);
}

std::string RaceCheck::what(const Region* region, uintptr_t address) {
  if (region != nullptr) return "byte " + std::to_string(address - region->begin) + " of " + region->name;
  char text[48];
  std::snprintf(text, sizeof(text), "global memory at 0x%zx", static_cast<size_t>(address));
  return text;
}

bool RaceCheck::found_race(const Cell& cell, const Region* region, uintptr_t address, const Record& now,
                           const Record& earlier) {
  const bool wrote = &earlier == &cell.write;
  if (wrote && cell.in_flight) {
    wrong_ = who(now) + " touches " + place_text(now.place) + " " + what(region, address) + " while the copy that " +
             who(earlier) + " issued " + place_text(earlier.place) + " is in flight: no " +
             (earlier.async ? "mbarrier_wait" : "cp_async_wait") + " covered it";
    return false;
  }
  const char* does = now.write ? "writes" : now.atomic ? "changes by an atomic" : "reads";
  const char* did = wrote ? "wrote" : earlier.atomic ? "changed by an atomic" : "read";
  wrong_ = "race on " + what(region, address) + ": " + who(now) + " " + does + " " + place_text(now.place) + " what " +
           who(earlier) + " " + did + " " + place_text(earlier.place) + ", and " +
           (earlier.block == number_ ? "no barrier is between" : "nothing orders the two blocks");
  return false;
}

bool RaceCheck::touch(Cell& cell, const Region* region, uintptr_t address, int thread, const Record& now) {
  const auto race_with = [&](const Record& r) {
    const bool conflict = now.write || r.write || r.atomic != now.atomic;
    return r.clock && r.bytes & now.bytes && conflict && (!before(r, thread) || (r.write && cell.in_flight));
  };
  if (blocks_ > 1 && region && region->rank != rank_of(static_cast<size_t>(thread)) && !reaches(*region, thread, now)) {
    return false;
  }
  if (race_with(cell.write)) return found_race(cell, region, address, now, cell.write);
  if (race_with(cell.read)) return found_race(cell, region, address, now, cell.read);
  for (const Record& earlier : cell.more) {
    if (race_with(earlier)) return found_race(cell, region, address, now, earlier);
  }
  if (now.async && region && cell.write.clock && !cell.write.async && !fenced(cell.write, thread)) {
    wrong_ = who(now) + (now.write ? " overwrites " : " reads ") + place_text(now.place) + " " + what(region, address) +
             ", which " + who(cell.write) + " wrote " + place_text(cell.write.place) +
             ", and no async_fence is between";
    return false;
  }
  if (now.write) {
    cell.read.clock = 0;
    cell.more.clear();
    cell.write = now;
    cell.in_flight = now.async && region;
    return true;
  }
  // An earlier record of the same thread or lane adds no information: what comes after this one comes after that one.
  const auto own = [&](const Record& r) {
    return r.clock && r.thread == now.thread && r.block == now.block && r.bytes == now.bytes && r.atomic == now.atomic;
  };
  for (Record& earlier : cell.more) {
    if (own(earlier)) return earlier = now, true;
  }
  if (own(cell.read)) return cell.read = now, true;
  // Nor does one of the same kind that is ordered before this one.
  const auto superseded = [&](const Record& r) {
    return r.clock == 0 || (r.atomic == now.atomic && r.bytes == now.bytes && before(r, thread));
  };
  cell.more.erase(std::remove_if(cell.more.begin(), cell.more.end(), superseded), cell.more.end());
  if (superseded(cell.read)) {
    cell.read = now;
    return true;
  }
  if (region == nullptr && cell.more.size() + 1 >= kReaders) cell.more.pop_back();
  cell.more.push_back(now);
  return true;
}

bool RaceCheck::access(int thread, const void* address, size_t bytes, Access kind, const void* place) {
  if (!active || reinterpret_cast<uintptr_t>(address) - stacks_ < stacks_bytes_) return true;
  Record now;
  now.place = place;
  now.clock = clocks_[static_cast<size_t>(thread)][static_cast<size_t>(thread)];
  now.thread = static_cast<uint16_t>(thread);
  now.write = kind == Access::kWrite;
  now.atomic = kind == Access::kAtomic;
  if (!touch_all(thread, now, address, bytes)) return false;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (now.atomic && region_of(begin) == nullptr) publish(thread, begin);
  return true;
}

bool RaceCheck::reaches(const Region& region, int thread, const Record& now) {
  const Clock& known = clocks_[static_cast<size_t>(thread)];
  const size_t each = threads_ / blocks_, first = static_cast<size_t>(region.rank) * each;
  if (std::all_of(known.begin() + static_cast<std::ptrdiff_t>(first),
                  known.begin() + static_cast<std::ptrdiff_t>(first + each),
                  [](uint32_t clock) { return clock == 0; })) {
    wrong_ = who(now) + (now.write ? " writes " : " reads ") + place_text(now.place) + " " + region.name +
             ", whose block need not have begun: no barrier of the cluster is before";
    return false;
  }
  Record& last = remote_[static_cast<size_t>(thread) * blocks_ + static_cast<size_t>(region.rank)];
  last = now;
  last.clock = known[static_cast<size_t>(thread)];
  return true;
}

bool RaceCheck::remote_accesses_end_in_time() {
  if (!enabled || blocks_ == 1) return true;
  const size_t each = threads_ / blocks_;
  for (size_t thread = 0; thread < threads_; ++thread) {
    for (size_t rank = 0; rank < blocks_; ++rank) {
      const Record& last = remote_[thread * blocks_ + rank];
      if (last.clock == 0) continue;
      const auto first = clocks_.begin() + static_cast<std::ptrdiff_t>(rank * each);
      const auto waited = [&](const Clock& clock) { return clock[thread] >= last.clock; };
      if (std::any_of(first, first + static_cast<std::ptrdiff_t>(each), waited)) continue;
      wrong_ = thread_text(thread) + (last.write ? " writes " : " reads ") + place_text(last.place) +
               " the shared memory of rank " + std::to_string(rank) +
               ", whose block may have ended: none of its threads waits for a barrier of the cluster after that";
      return false;
    }
  }
  return true;
}

void RaceCheck::publish(int thread, uintptr_t address) {
  std::vector<Published>& here = published_[address];
  found_[static_cast<size_t>(thread)].emplace_back(address, here.size());
  const Clock& fenced = fenced_clocks_[static_cast<size_t>(thread)];
  if (!fenced.empty()) here.push_back({number_, fenced});
}

void RaceCheck::device_fence(int thread) {
  if (!enabled) return;
  const auto self = static_cast<size_t>(thread);
  fenced_clocks_[self] = clocks_[self];
  const uint32_t epoch = ++clocks_[self][self];
  for (const auto& [address, count] : found_[self]) {
    for (size_t i = 0; i < count; ++i) acquired_.push_back({published_[address][i], thread, epoch});
  }
  found_[self].clear();
}

bool RaceCheck::acquired(const Record& record, int thread) const {
  return std::any_of(acquired_.begin(), acquired_.end(), [&](const Acquired& a) {
    return a.published.block == record.block && record.thread < a.published.clock.size() &&
           record.clock <= a.published.clock[record.thread] &&
           (a.thread == thread || a.epoch <= clocks_[static_cast<size_t>(thread)][static_cast<size_t>(a.thread)]);
  });
}

bool RaceCheck::touch_all(int thread, const Record& access, const void* address, size_t bytes) {
  Record now = access;
  now.block = number_;
  return each_cell(reinterpret_cast<uintptr_t>(address), bytes, now.write,
                   [&](Cell& cell, const Region* region, uintptr_t at, uint8_t mask) {
                     now.bytes = mask;
                     return touch(cell, region, at, thread, now);
                   });
}

int RaceCheck::add_lane(const std::string& name) {
  if (!enabled) return -1;
  lane_names_.push_back(name);
  operations_.push_back(0);
  for (Clock& clock : clocks_) clock.push_back(0);
  return static_cast<int>(threads_ + lane_names_.size()) - 1;
}

uint32_t RaceCheck::next_operation(int lane) {
  return lane < 0 ? 0 : ++operations_[static_cast<size_t>(lane) - threads_];
}

uint32_t RaceCheck::last_operation(int lane) const {
  return lane < 0 ? 0 : operations_[static_cast<size_t>(lane) - threads_];
}

bool RaceCheck::async_access(int thread, int lane, uint32_t clock, const void* address, size_t bytes, Access kind,
                             const void* place) {
  if (!active) return true;
  Record now;
  now.place = place;
  now.clock = clock;
  now.thread = static_cast<uint16_t>(lane);
  now.write = kind == Access::kWrite;
  now.async = true;
  return touch_all(thread, now, address, bytes);
}

void RaceCheck::finish_write(const void* address, size_t bytes) {
  if (!active) return;
  each_cell(reinterpret_cast<uintptr_t>(address), bytes, false, [](Cell& cell, const Region*, uintptr_t, uint8_t) {
    cell.in_flight = false;
    return true;
  });
}

void RaceCheck::fence(int thread) {
  if (!enabled) return;
  uint32_t& own = clocks_[static_cast<size_t>(thread)][static_cast<size_t>(thread)];
  fences_[static_cast<size_t>(thread)].push_back(own++);
}

bool RaceCheck::fenced(const Record& written, int thread) const {
  const std::vector<uint32_t>& fences = fences_[written.thread];
  const auto first = std::lower_bound(fences.begin(), fences.end(), written.clock);
  if (first == fences.end()) return false;
  return written.thread == thread || *first <= clocks_[static_cast<size_t>(thread)][written.thread];
}

void RaceCheck::add(Clock& clock, int lane, uint32_t operation) {
  if (lane < 0) return;
  const auto at = static_cast<size_t>(lane);
  if (clock.size() <= at) clock.resize(at + 1, 0);
  clock[at] = std::max(clock[at], operation);
}

void RaceCheck::acquire(int thread, int lane, uint32_t operation) {
  if (lane >= 0) add(clocks_[static_cast<size_t>(thread)], lane, operation);
}

bool RaceCheck::issue_copy(int thread, const void* address, size_t bytes, const void* place) {
  if (!active) return true;
  if (!access(thread, address, bytes, Access::kWrite, place)) return false;
  return each_cell(reinterpret_cast<uintptr_t>(address), bytes, false,
                   [](Cell& cell, const Region*, uintptr_t, uint8_t) { return cell.in_flight = true; });
}

void RaceCheck::deliver_copy(int thread, const void* address, size_t bytes) {
  if (!active) return;
  const uint32_t clock = clocks_[static_cast<size_t>(thread)][static_cast<size_t>(thread)];
  each_cell(reinterpret_cast<uintptr_t>(address), bytes, false, [clock](Cell& cell, const Region*, uintptr_t, uint8_t) {
    cell.in_flight = false;
    cell.write.clock = clock;
    return true;
  });
}

void RaceCheck::release(int thread, Clock& clock) {
  if (!enabled) return;
  Clock& own = clocks_[static_cast<size_t>(thread)];
  if (clock.size() < own.size()) clock.resize(own.size(), 0);
  for (size_t i = 0; i < own.size(); ++i) clock[i] = std::max(clock[i], own[i]);
  ++own[static_cast<size_t>(thread)];
}

void RaceCheck::acquire(int thread, const Clock& clock) {
  if (!enabled) return;
  Clock& own = clocks_[static_cast<size_t>(thread)];
  for (size_t i = 0; i < clock.size(); ++i) own[i] = std::max(own[i], clock[i]);
}

std::string place_text(const void* place) {
  Dl_info info;
  if (dladdr(place, &info) == 0) return "";
  char text[32];
  // The place is a return address: the call is before it.
  std::snprintf(text, sizeof(text), "[+0x%zx]",
                static_cast<size_t>(static_cast<const char*>(place) - static_cast<const char*>(info.dli_fbase)) - 1);
  return text;
}

}  // namespace tdc::emulator
