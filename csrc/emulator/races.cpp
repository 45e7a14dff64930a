#include "emulator/races.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "emulator/block.h"

namespace tdc::emulator {

void RaceCheck::begin_block(int threads) {
  if (!enabled) return;
  ++block_;
  num_regions_ = 0;
  low_ = span_ = 0;
  const auto count = static_cast<size_t>(threads);
  clocks_.resize(count);
  for (size_t t = 0; t < count; ++t) {
    clocks_[t].assign(count, 0);
    clocks_[t][t] = 1;
  }
}

void RaceCheck::add_region(const void* begin, size_t bytes, const std::string& name) {
  if (!enabled || bytes == 0) return;
  if (regions_.size() == num_regions_) regions_.emplace_back();
  Region& region = regions_[num_regions_++];
  region.begin = reinterpret_cast<uintptr_t>(begin);
  region.bytes = bytes;
  region.name = name;
  if (region.cells.size() < (bytes + kCell - 1) / kCell) region.cells.resize((bytes + kCell - 1) / kCell);
  const uintptr_t high = std::max(low_ + span_, region.begin + bytes);
  low_ = span_ == 0 ? region.begin : std::min(low_, region.begin);
  span_ = high - low_;
}

RaceCheck::Region* RaceCheck::region_of(uintptr_t address) {
  for (size_t i = 0; i < num_regions_; ++i) {
    if (address - regions_[i].begin < regions_[i].bytes) return &regions_[i];
  }
  return nullptr;
}

RaceCheck::Cell& RaceCheck::cell(Region& region, size_t index) {
  Cell& cell = region.cells[index];
  if (cell.block != block_) {
    cell.block = block_;
    cell.write = Record();
    cell.reads.clear();
    cell.in_flight = false;
  }
  return cell;
}

std::string RaceCheck::report(const Region& region, size_t index, const char* does, const Record& now, const char* did,
                              const Record& earlier) {
  return "race on byte " + std::to_string(index * kCell) + " of " + region.name + ": thread " +
         std::to_string(now.thread) + " " + does + " " + place_text(now.place) + " what thread " +
         std::to_string(earlier.thread) + " " + did + " " + place_text(earlier.place) + ", and no barrier is between";
}

std::string RaceCheck::touch(Region& region, size_t index, uint8_t bytes, Access kind, Record now) {
  const char* does = kind == Access::kRead ? "reads" : kind == Access::kWrite ? "writes" : "changes by an atomic";
  Cell& at = cell(region, index);
  now.bytes = bytes;
  now.atomic = kind == Access::kAtomic;
  if (at.in_flight && at.write.bytes & bytes) {
    return "thread " + std::to_string(now.thread) + " " + does + " " + place_text(now.place) + " byte " +
           std::to_string(index * kCell) + " of " + region.name + " while the copy that thread " +
           std::to_string(at.write.thread) + " issued " + place_text(at.write.place) +
           " is in flight: no cp_async_wait covered it";
  }
  const auto unordered = [&](const Record& r) {
    return r.thread != now.thread && r.bytes & bytes && !before(r, now.thread);
  };
  if (at.write.clock && unordered(at.write)) return report(region, index, does, now, "wrote", at.write);
  for (const Record& earlier : at.reads) {
    const bool conflict = kind == Access::kWrite || earlier.atomic != now.atomic;
    if (conflict && unordered(earlier)) {
      return report(region, index, does, now, earlier.atomic ? "changed by an atomic" : "read", earlier);
    }
  }
  if (kind == Access::kWrite) {
    at.reads.clear();
    at.write = now;
    return "";
  }
  // An earlier record of the same kind that is before this one says nothing that this one does not.
  const auto superseded = [&](const Record& r) {
    return r.atomic == now.atomic && r.bytes == bytes && (r.thread == now.thread || before(r, now.thread));
  };
  at.reads.erase(std::remove_if(at.reads.begin(), at.reads.end(), superseded), at.reads.end());
  at.reads.push_back(now);
  return "";
}

std::string RaceCheck::access(int thread, const void* address, size_t bytes, Access kind, const void* place) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  Region* region = region_of(begin);
  if (region == nullptr) return "";
  const size_t offset = begin - region->begin, end = std::min(offset + bytes, region->bytes);
  Record now;
  now.place = place;
  now.clock = clocks_[static_cast<size_t>(thread)][static_cast<size_t>(thread)];
  now.thread = static_cast<uint16_t>(thread);
  for (size_t index = offset / kCell; index * kCell < end; ++index) {
    const size_t first = std::max(offset, index * kCell), last = std::min(end, (index + 1) * kCell);
    const auto mask = static_cast<uint8_t>(((1u << (last - first)) - 1) << (first - index * kCell));
    std::string wrong = touch(*region, index, mask, kind, now);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

std::string RaceCheck::issue_copy(int thread, const void* address, size_t bytes, const void* place) {
  std::string wrong = access(thread, address, bytes, Access::kWrite, place);
  if (!wrong.empty()) return wrong;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  Region* region = region_of(begin);
  for (size_t i = 0; region != nullptr && i < bytes / kCell; ++i) {
    cell(*region, (begin - region->begin) / kCell + i).in_flight = true;
  }
  return "";
}

void RaceCheck::deliver_copy(int thread, const void* address, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  Region* region = enabled ? region_of(begin) : nullptr;
  for (size_t i = 0; region != nullptr && i < bytes / kCell; ++i) {
    Cell& at = cell(*region, (begin - region->begin) / kCell + i);
    at.in_flight = false;
    at.write.clock = clocks_[static_cast<size_t>(thread)][static_cast<size_t>(thread)];
  }
}

void RaceCheck::release(int thread, Clock& clock) {
  if (!enabled) return;
  Clock& own = clocks_[static_cast<size_t>(thread)];
  if (clock.size() != own.size()) clock.assign(own.size(), 0);
  for (size_t i = 0; i < own.size(); ++i) clock[i] = std::max(clock[i], own[i]);
  ++own[static_cast<size_t>(thread)];
}

void RaceCheck::acquire(int thread, const Clock& clock) {
  if (!enabled) return;
  Clock& own = clocks_[static_cast<size_t>(thread)];
  for (size_t i = 0; i < own.size(); ++i) own[i] = std::max(own[i], clock[i]);
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

// What -fsanitize=thread makes compiled code call.

#define TDC_HOOK extern "C" __attribute__((visibility("hidden"), noinline))
#define TDC_ACCESS(kind, address, bytes)                                                             \
  using tdc::emulator::RaceCheck;                                                                    \
  if (tdc::emulator::block.races().near(address)) {                                                  \
    tdc::emulator::block.note(address, bytes, RaceCheck::Access::kind, __builtin_return_address(0)); \
  }
#define TDC_HOOKS(bytes)                                                                              \
  TDC_HOOK void __tsan_read##bytes(void* address){                                                    \
      TDC_ACCESS(kRead, address, bytes)} TDC_HOOK void __tsan_write##bytes(void* address){            \
      TDC_ACCESS(kWrite, address, bytes)} TDC_HOOK void __tsan_unaligned_read##bytes(void* address){  \
      TDC_ACCESS(kRead, address, bytes)} TDC_HOOK void __tsan_unaligned_write##bytes(void* address) { \
    TDC_ACCESS(kWrite, address, bytes)                                                                \
  }

TDC_HOOKS(1)
TDC_HOOKS(2)
TDC_HOOKS(4)
TDC_HOOKS(8)
TDC_HOOKS(16)
TDC_HOOK void __tsan_read_range(void* address, size_t bytes){TDC_ACCESS(kRead, address, bytes)} TDC_HOOK
    void __tsan_write_range(void* address, size_t bytes){TDC_ACCESS(kWrite, address, bytes)} TDC_HOOK
    void __tsan_init() {
  tdc::emulator::RaceCheck::enabled = true;
}
TDC_HOOK void __tsan_func_entry(void*) {}
TDC_HOOK void __tsan_func_exit() {}
TDC_HOOK void __tsan_vptr_update(void**, void*) {}
TDC_HOOK void __tsan_vptr_read(void**) {}
// Clang's.
TDC_HOOK void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  {
    TDC_ACCESS(kRead, from, bytes)
  }
  {
    TDC_ACCESS(kWrite, to, bytes)
  }
  return std::memcpy(to, from, bytes);
}
TDC_HOOK void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  {
    TDC_ACCESS(kRead, from, bytes)
  }
  {
    TDC_ACCESS(kWrite, to, bytes)
  }
  return std::memmove(to, from, bytes);
}
TDC_HOOK void* __tsan_memset(void* to, int value, size_t bytes) {
  TDC_ACCESS(kWrite, to, bytes)
  return std::memset(to, value, bytes);
}
