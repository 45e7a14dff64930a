// The shared memory of the running cluster's blocks.
#include <cstdlib>
#include <cstring>
#include <new>

#include "emulator/block.h"

namespace tdc::emulator {
namespace {

constexpr size_t kAlignment = 1024;
// Where dynamic shared memory begins in the window: what the system reserves comes before.
constexpr unsigned kWindow = 1024;

}  // namespace

void Block::Free::operator()(unsigned char* bytes) const { std::free(bytes); }

unsigned char* Block::dynamic_shared() const { return dynamic().bytes.get(); }

unsigned char* Block::add_shared(int rank, const void* key, size_t bytes, const std::string& name) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, bytes) != 0) throw std::bad_alloc();
  std::memset(memory, kPoison, bytes);
  const std::string whose = cluster_ > 1 ? name + " of rank " + std::to_string(rank) : name;
  races_.add_region(memory, bytes, whose, rank);
  auto& shared = shared_[static_cast<size_t>(rank)];
  shared.push_back({key, bytes, whose, std::unique_ptr<unsigned char, Free>(static_cast<unsigned char*>(memory))});
  return shared.back().bytes.get();
}

unsigned char* Block::shared_array(int rank, const void* key, size_t bytes, const std::string& name) {
  for (Shared& shared : shared_[static_cast<size_t>(rank)]) {
    if (shared.key == key) return shared.bytes.get();
  }
  return add_shared(rank, key, bytes, name);
}

unsigned char* Block::static_shared(const void* key, size_t bytes, const char* name) {
  return shared_array(rank(), key, bytes, std::string("the shared array ") + name);
}

void* Block::shared_of(const Site& site, const void* shared, int rank_of_other) {
  if (rank_of_other < 0 || rank_of_other >= cluster_) {
    fail(site, "no rank " + std::to_string(rank_of_other) + " in a cluster of " + std::to_string(cluster_));
  }
  check_shared(site, shared, 1, 1);
  const auto at = reinterpret_cast<uintptr_t>(shared);
  for (const Shared& own : shared_[static_cast<size_t>(rank())]) {
    const size_t offset = at - reinterpret_cast<uintptr_t>(own.bytes.get());
    if (offset >= own.size) continue;
    const std::string name = own.name.substr(0, own.name.rfind(" of rank "));
    return shared_array(rank_of_other, own.key, own.size, name) + offset;
  }
  return nullptr;
}

unsigned Block::window_of(const Site& site, const void* shared) {
  check_shared(site, shared, 1, 1);
  const auto offset = static_cast<const unsigned char*>(shared) - dynamic_shared();
  if (offset < 0 || static_cast<size_t>(offset) >= dynamic().size) {
    fail(site, "only the dynamic shared memory has window addresses, not " + place_in_shared(shared));
  }
  return kWindow + static_cast<unsigned>(offset);
}

unsigned char* Block::pointer_to(const Site& site, unsigned window, unsigned bytes) {
  if (window < kWindow || window + bytes > kWindow + dynamic().size) {
    fail(site, std::to_string(bytes) + " bytes at window address " + std::to_string(window) +
                   " are not in the dynamic shared memory, which has " + std::to_string(kWindow) + " to " +
                   std::to_string(kWindow + dynamic().size));
  }
  return dynamic_shared() + (window - kWindow);
}

std::string Block::place_in_shared(const void* address) const {
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (const auto& of_block : shared_) {
    for (const Shared& shared : of_block) {
      const auto begin = reinterpret_cast<uintptr_t>(shared.bytes.get());
      if (at - begin < shared.size) return "byte " + std::to_string(at - begin) + " of " + shared.name;
    }
  }
  return "an address outside of shared memory";
}

void Block::check_shared(const Site& site, const void* address, size_t bytes, size_t alignment) {
  constexpr size_t kNear = 1 << 16;
  const auto at = reinterpret_cast<uintptr_t>(address);
  std::string nearest;
  for (const Shared& shared : shared_[static_cast<size_t>(rank())]) {
    const auto begin = reinterpret_cast<uintptr_t>(shared.bytes.get());
    const auto end = begin + shared.size;
    if (at >= end && at - end < kNear)
      nearest = ": it is " + std::to_string(at - end) + " past the end of " + shared.name;
    if (at < begin || at >= end) continue;
    const std::string which = "byte " + std::to_string(at - begin) + " of " + shared.name;
    if (at % alignment) fail(site, "misaligned: " + which + " is no multiple of " + std::to_string(alignment));
    if (at + bytes <= end) return;
    fail(site, std::to_string(bytes) + " bytes from " + which + " on, which has " + std::to_string(shared.size));
  }
  fail(site, "the address does not lie in " + std::string(cluster_ > 1 ? "the block's own " : "") + "shared memory" +
                 nearest);
}

}  // namespace tdc::emulator
