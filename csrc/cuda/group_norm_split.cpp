#include "cuda/group_norm_split.h"

#include <algorithm>
#include <numeric>

namespace tdc {
namespace {

constexpr int64_t kWarpThreads = 32, kFewestThreads = 64;
// Backward holds twice the coefficients: blocks half as large still give an SM two of them.
constexpr int64_t kMostForwardThreads = 512, kMostBackwardThreads = 256;
constexpr int64_t kSector = 64;        // bytes of a pixel that a block should read at least: two sectors of L2
constexpr int64_t kLine = 128;         // and better: a whole line
constexpr int64_t kSplitTile = 32768;  // bytes of a run of pixels where one block does not take them all
constexpr int64_t kStaticShared = 16;  // what kernels declare themselves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int log2_at_least(int64_t value) {
  int log2 = 0;
  while ((int64_t{1} << log2) < value) ++log2;
  return log2;
}

class Splitter {
 public:
  Splitter(const NormArguments& a, const Device& device, bool backward, bool aligned)
      : a_(a), device_(device), backward_(backward), element_(a.dtype == 0 ? 4 : 2) {
    const int64_t per_vector = 16 / element_;
    vector_ = aligned && a.channels % per_vector == 0;
    lane_channels_ = vector_ ? per_vector : 1;
    // Chunks are whole norm groups and whole vectors.
    unit_ = std::lcm(a.channels / a.num_norm_groups, lane_channels_);
  }

  NormSplit split() const {
    NormSplit whole = best_whole();
    if (whole.refusal.empty() && !starves(whole)) return whole;
    NormSplit runs = best_runs();
    return runs.refusal.empty() || !whole.refusal.empty() ? runs : whole;
  }

 private:
  int64_t pixels() const { return a_.height * a_.width; }

  // The split with chunks of this many channels and runs of this many pixels.
  NormSplit laid_out(int64_t chunk_channels, int64_t pixels_per_block, bool keeps_tile) const {
    NormSplit s;
    s.vector = vector_;
    s.chunk_channels = std::min(chunk_channels, a_.channels);
    s.chunks = ceil_div(a_.channels, s.chunk_channels);
    s.pixels_per_block = std::max<int64_t>(pixels_per_block, 1);
    s.splits = std::max<int64_t>(1, ceil_div(pixels(), s.pixels_per_block));
    const int64_t vectors = s.chunk_channels / lane_channels_;
    const int64_t most = backward_ ? kMostBackwardThreads : kMostForwardThreads;
    // About eight vectors per thread; more threads would have little to do between the barriers.
    const int64_t wanted = int64_t{1} << log2_at_least(ceil_div(vectors * s.pixels_per_block, 8));
    s.threads = std::clamp(wanted, kFewestThreads, most);
    while (s.threads < vectors && s.threads < most) s.threads *= 2;
    s.lanes_log2 = std::min(log2_at_least(vectors), log2_at_least(s.threads));

    const int64_t arrays = backward_ ? 5 : 3, sums = 2;
    const int64_t lanes = int64_t{1} << s.lanes_log2;
    const int64_t rows = lanes < kWarpThreads ? s.threads / kWarpThreads : s.threads / lanes;
    s.row_sums = round_up(arrays * s.chunk_channels * 4, 16);
    s.tile = s.row_sums + round_up(sums * rows * lanes * lane_channels_ * 4, 16);
    const int64_t tensors = keeps_tile ? (backward_ ? 2 : 1) : 0;
    s.shared_bytes = s.tile + tensors * s.pixels_per_block * s.chunk_channels * element_;
    if (s.shared_bytes + kStaticShared > device_.shared_limit) {
      s.refusal = "shared memory does not hold one pixel of " + std::to_string(s.chunk_channels) + " channels";
    }
    return s;
  }

  // All pixels of a chunk in one block. Chunks grow to whole lines of memory while several blocks still fit on an SM
  // and there are enough of them to go round.
  NormSplit best_whole() const {
    NormSplit best = laid_out(unit_, pixels(), true);
    if (!vector_) best.refusal = "no vectors";
    for (int64_t channels = 2 * unit_; best.refusal.empty() && channels <= a_.channels; channels += unit_) {
      if (channels * element_ > kLine) break;
      const NormSplit next = laid_out(channels, pixels(), true);
      const int64_t blocks_per_sm = best.chunk_channels * element_ < kSector ? 2 : 3;
      if (next.shared_bytes * blocks_per_sm > device_.shared_limit) break;
      if (best.chunk_channels * element_ >= kSector && a_.batch * next.chunks < 2 * device_.multiprocessors) break;
      best = next;
    }
    best.whole = true;
    return best;
  }

  // So few blocks, each with so much to do, that a second launch costs less than idle SMs.
  bool starves(const NormSplit& s) const {
    return a_.batch * s.chunks * 4 <= device_.multiprocessors && s.shared_bytes > 2 * kSplitTile;
  }

  // Runs of pixels of at most kSplitTile bytes, shorter where there would be too few blocks.
  NormSplit best_runs() const {
    const int64_t line_units = std::max<int64_t>(1, kLine / (unit_ * element_));
    const int64_t channels = std::min(line_units * unit_, a_.channels);
    const int64_t pixel_bytes = channels * element_;
    const int64_t blocks_per_run = a_.batch * ceil_div(a_.channels, channels);
    const int64_t wanted_runs = ceil_div(4 * device_.multiprocessors, std::max<int64_t>(blocks_per_run, 1));
    const int64_t for_parallelism = std::max(ceil_div(pixels(), wanted_runs), ceil_div(kSplitTile / 4, pixel_bytes));
    const int64_t for_space = std::max<int64_t>(1, kSplitTile / pixel_bytes);
    return laid_out(channels, std::min({for_parallelism, for_space, std::max<int64_t>(pixels(), 1)}), !backward_);
  }

  const NormArguments& a_;
  const Device& device_;
  bool backward_, vector_;
  int64_t element_, lane_channels_, unit_;
};

}  // namespace

NormSplit split_group_norm(const NormArguments& arguments, const Device& device, bool backward, bool aligned) {
  return Splitter(arguments, device, backward, aligned).split();
}

}  // namespace tdc
