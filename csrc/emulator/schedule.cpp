#include "emulator/schedule.h"

#include <algorithm>
#include <utility>

namespace tdc::emulator {

uint64_t Schedule::random() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return state_ >> 16;
}

template <class T>
void Schedule::shuffle(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random() % i]);
}

std::vector<unsigned> Schedule::block_order(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = seed_ == 1 ? blocks - 1 - i : i;
  if (seed_ > 1) shuffle(order);
  return order;
}

void Schedule::arrange_threads(int threads) {
  thread_at_.clear();
  std::vector<int> warps((threads + kWarp - 1) / kWarp), lanes;
  for (size_t w = 0; w < warps.size(); ++w) warps[w] = static_cast<int>(w);
  if (seed_ > 1) shuffle(warps);
  for (int warp : warps) {
    lanes.clear();
    for (int t = warp * kWarp; t < std::min(threads, (warp + 1) * kWarp); ++t) lanes.push_back(t);
    if (seed_ > 1) shuffle(lanes);
    thread_at_.insert(thread_at_.end(), lanes.begin(), lanes.end());
  }
  if (seed_ == 1) std::reverse(thread_at_.begin(), thread_at_.end());
  rank_of_.resize(thread_at_.size());
  for (size_t rank = 0; rank < thread_at_.size(); ++rank) {
    rank_of_[static_cast<size_t>(thread_at_[rank])] = static_cast<int>(rank);
  }
}

}  // namespace tdc::emulator
