// How group norm splits its work: samples, and blocks of rows within a sample. The blocks depend on the image's shape
// alone, and partial results are combined in block order, so no result depends on the number of threads, and none of a
// sample on the rest of its batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "common/parallel.h"
#include "cpu/group_norm.h"
#include "cpu/group_norm_kernels.h"

namespace tdc {

// Rows are pixels. A block is small enough for the second-level cache and has enough rows to be worth its overhead.
struct RowBlocks {
  int64_t rows;
  int64_t rows_per_block;
  int64_t count;

  explicit RowBlocks(const GroupNormProblem& p) : rows(p.pixels()) {
    constexpr int64_t kBlockFloats = 16384, kFewestRows = 32, kMostRows = 512;
    const int64_t wanted = std::clamp(kBlockFloats / p.channels, kFewestRows, kMostRows);
    count = (rows + wanted - 1) / wanted;
    rows_per_block = count ? (rows + count - 1) / count : 0;
    count = rows_per_block ? (rows + rows_per_block - 1) / rows_per_block : 0;
  }

  int64_t first(int64_t block) const { return block * rows_per_block; }
  int64_t size(int64_t block) const { return std::min(rows_per_block, rows - first(block)); }
};

// The tensors as one sample sees them.
class SampleView {
 public:
  explicit SampleView(const GroupNormProblem& p) : p_(p), element_(p.dtype == DType::kBFloat16 ? 2 : 4), blocks(p) {}

  int64_t group(int64_t b) const {
    return std::upper_bound(p_.offsets, p_.offsets + p_.num_groups + 1, static_cast<int32_t>(b)) - p_.offsets - 1;
  }
  int64_t expert(int64_t group) const { return p_.weight_index ? p_.weight_index[group] : group; }
  int64_t live(int64_t group) const { return p_.widths ? p_.widths[group] : p_.channels; }

  NormLayout layout(int64_t b) const { return {p_.channels, live(group(b)), p_.channels_per_group()}; }

  // The channels of sample b in its inputs, x and x2.
  int num_parts() const { return p_.x2_channels ? 2 : 1; }
  NormPart part(int64_t b, int i) const {
    const int64_t first = i ? p_.x_channels() : 0, channels = i ? p_.x2_channels : p_.x_channels();
    return {first, channels, std::clamp<int64_t>(live(group(b)) - first, 0, channels)};
  }

  NormSampleParameters parameters(const GroupNormInputs& in, int64_t b) const {
    const int64_t e = expert(group(b));
    return {row(in.weight, e), row(in.bias, e), row(in.scale, b), row(in.shift, b)};
  }

  // The rows of a block of one part of an activation tensor: of one that has that part's channels alone, or of a
  // tensor that has all channels.
  template <typename T>
  NormRows<T> own_block(T* tensor, int64_t b, int64_t block, const NormPart& part) const {
    return rows(tensor, b, block, part.channels, 0);
  }
  template <typename T>
  NormRows<T> joint_block(T* tensor, int64_t b, int64_t block, const NormPart& part) const {
    return rows(tensor, b, block, p_.channels, part.first);
  }

  // Row i of a tensor of `channels` columns, or null for a null tensor.
  const void* row(const void* tensor, int64_t i) const {
    return tensor ? static_cast<const char*>(tensor) + i * p_.channels * element_ : nullptr;
  }
  void* row(void* tensor, int64_t i) const { return const_cast<void*>(row(const_cast<const void*>(tensor), i)); }

 private:
  template <typename T>
  NormRows<T> rows(T* tensor, int64_t b, int64_t block, int64_t stride, int64_t first) const {
    if (!tensor) return {nullptr, stride};
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    const int64_t at = (b * blocks.rows + blocks.first(block)) * stride + first;
    return {static_cast<Byte*>(tensor) + at * element_, stride};
  }

  const GroupNormProblem& p_;
  int64_t element_;

 public:
  const RowBlocks blocks;
};

// The threads that a problem gets: one for little work, where waking another costs more than it saves. On two cores
// with awake threads one is faster up to 16384 elements, forward and backward, two are from 32768 on.
inline int useful_threads(const GroupNormProblem& p) {
  constexpr int64_t kParallelElements = int64_t{1} << 15;
  return p.batch * p.pixels() * p.channels < kParallelElements ? 1 : p.threads;
}

// Runs, for every sample in [begin, end): prepare(b, slot), gather(b, block, slot, thread) over its blocks,
// finish(b, slot), then spread(b, block, slot) over its blocks. `slot` numbers the storage that carries a sample
// through these steps.
class BlockSchedule {
 public:
  BlockSchedule(int64_t samples, int64_t blocks, int threads)
      : blocks_(blocks), threads_(static_cast<int>(std::max(1, threads))) {
    // Whole samples keep their data in cache between the steps. Blocks of all samples at once are better when the
    // samples would leave threads idle for long.
    const int64_t rounds = (samples + threads_ - 1) / threads_;
    whole_samples_ = blocks <= 1 || threads_ == 1 || samples % threads_ == 0 || rounds >= 4;
    slots_ = whole_samples_ ? std::min<int64_t>(threads_, samples) : samples;
  }

  int64_t slots() const { return slots_; }
  int threads() const { return threads_; }

  template <typename Prepare, typename Gather, typename Finish, typename Spread>
  void run(int64_t begin, int64_t end, const Prepare& prepare, const Gather& gather, const Finish& finish,
           const Spread& spread) const {
    const int64_t samples = end - begin;
    if (whole_samples_) {
      parallel_for(samples, threads_, [&](int64_t i, int thread) {
        prepare(begin + i, thread);
        for (int64_t k = 0; k < blocks_; ++k) gather(begin + i, k, thread, thread);
        finish(begin + i, thread);
        // Backwards: the blocks read last are still in cache.
        for (int64_t k = blocks_; k-- > 0;) spread(begin + i, k, thread);
      });
      return;
    }
    parallel_for(samples, threads_, [&](int64_t i, int) { prepare(begin + i, i); });
    parallel_for(samples * blocks_, threads_,
                 [&](int64_t i, int thread) { gather(begin + i / blocks_, i % blocks_, i / blocks_, thread); });
    parallel_for(samples, threads_, [&](int64_t i, int) { finish(begin + i, i); });
    parallel_for(samples * blocks_, threads_, [&](int64_t i, int) {
      const int64_t j = samples * blocks_ - 1 - i;
      spread(begin + j / blocks_, j % blocks_, j / blocks_);
    });
  }

 private:
  int64_t blocks_;
  int threads_;
  bool whole_samples_;
  int64_t slots_;
};

// Uninitialised storage of `slots` slots, each padded to whole cache lines.
template <typename T>
class SlotStorage {
 public:
  SlotStorage(int64_t slots, int64_t per_slot)
      : per_slot_((per_slot * sizeof(T) + 127) / 64 * 64 / sizeof(T)), data_(new T[slots * per_slot_]) {}
  T* operator[](int64_t slot) const { return data_.get() + slot * per_slot_; }

 private:
  int64_t per_slot_;
  std::unique_ptr<T[]> data_;
};

}  // namespace tdc
