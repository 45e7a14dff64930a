// Which thread of a block the emulator runs next, and which block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tdc::emulator {

constexpr int kMaxThreads = 2048;  // of a cluster
constexpr int kWarp = 32;

// A set of numbers below kMaxThreads.
class ThreadSet {
 public:
  void insert(int i) { words_[i >> 6] |= uint64_t{1} << (i & 63); }
  void erase(int i) { words_[i >> 6] &= ~(uint64_t{1} << (i & 63)); }
  bool contains(int i) const { return words_[i >> 6] >> (i & 63) & 1; }
  void clear() { *this = ThreadSet(); }
  // The smallest member that is at least `start`, or -1.
  int first(int start = 0) const {
    for (int word = start >> 6; word < kMaxThreads / 64; ++word) {
      uint64_t bits = words_[word];
      if (word == start >> 6) bits &= ~uint64_t{0} << (start & 63);
      if (bits) return word * 64 + __builtin_ctzll(bits);
    }
    return -1;
  }

 private:
  uint64_t words_[kMaxThreads / 64] = {};
};

// Which ready thread continues, and the order of blocks. 0: always the first, so that early warps run as far ahead as
// the barriers allow; 1: always the last; any other: a random order of warps and lanes, with random turns.
class Schedule {
 public:
  explicit Schedule(unsigned seed) : seed_(seed), state_(seed * 0x9E3779B97F4A7C15u + 0x1234567u) {}

  std::vector<unsigned> block_order(unsigned blocks);
  // Ranks of the threads of a cluster: thread_at(rank) is preferred to those of higher rank.
  void arrange_threads(int threads);
  int thread_at(int rank) const { return thread_at_[static_cast<size_t>(rank)]; }
  int rank_of(int thread) const { return rank_of_[static_cast<size_t>(thread)]; }
  // Which of the copies under way, oldest first, arrives now; -1: none. 0: they arrive when no thread can go on; 1: at
  // once; any other: one of them, now and then.
  int copy_to_deliver(int copies) {
    if (seed_ < 2) return seed_ == 1 ? 0 : -1;
    return random() % 4 != 0 ? -1 : static_cast<int>(random() % static_cast<uint64_t>(copies));
  }
  // The rank at which the search for the next thread begins.
  int start(int threads) { return seed_ < 2 || random() % 8 != 0 ? 0 : static_cast<int>(random() % threads); }

 private:
  uint64_t random();
  template <class T>
  void shuffle(std::vector<T>& items);

  unsigned seed_;
  uint64_t state_;
  std::vector<int> thread_at_, rank_of_;
};

}  // namespace tdc::emulator
