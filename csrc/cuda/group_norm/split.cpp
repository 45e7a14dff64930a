#include "cuda/group_norm/split.h"

#include <algorithm>
#include <numeric>

namespace tdc {
namespace {

constexpr int64_t kWarpThreads = 32, kFewestThreads = 64, kMostThreads = 512;
// Threads per SM that registers allow (backward holds more coefficients).
constexpr int64_t kForwardThreadsPerSm = 1024, kBackwardThreadsPerSm = 512;
constexpr int64_t kVectorsPerThread = 8;  // with fewer, a block does little between its barriers
constexpr int64_t kLeastRow = 32;         // bytes of a pixel, a sector of L2: of less, two blocks fetch the same bytes
constexpr int64_t kSector = 64;           // bytes of a pixel that a block should read at least: two sectors of L2
constexpr int64_t kLine = 128;            // and better: a whole line
constexpr int64_t kBlocksPerSm = 3;       // while one reads, another computes and a third writes
constexpr int64_t kRunBytes = 32768;      // of a run of pixels, where one block does not hold them all
constexpr int64_t kStaticShared = 48;     // most static shared memory of a kernel
constexpr int64_t kBlockShared = 1024;    // that the system takes for itself per block

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
    vector_ = aligned && a.channels % per_vector == 0 && a.x2_channels % per_vector == 0;
    lane_channels_ = vector_ ? per_vector : 1;
    // Chunks are whole norm groups and whole vectors.
    unit_ = std::lcm(a.channels / a.num_norm_groups, lane_channels_);
  }

  NormSplit split() const {
    if (vector_) {
      for (int tensors = backward_ ? 2 : 1; tensors > 0; --tensors) {
        const NormSplit whole = best_whole(tensors);
        if (whole.refusal.empty() && !starves(whole) && !halves_sectors(whole)) return whole;
      }
    }
    return best_runs();
  }

  // Forward has two tiles, backward one of x and dy, whose places are filled again one by one. Rows of whole sectors,
  // two blocks on an SM, and the widest rows up to a line. A copy fetches a line into the L2, so that shorter rows
  // suffice where neighbouring blocks have the rest of it.
  NormSplit stream() const {
    NormSplit best;
    best.refusal = "its channels are no whole 16-byte vectors";
    if (!vector_) return best;
    best.refusal = "the pixels of its chunks do not fit in shared memory";
    int64_t best_rank = 0;
    for (int64_t units = 1; units * unit_ <= a_.channels; ++units) {
      const int64_t channels = units * unit_, row = channels * element_;
      if (a_.channels % channels || (row > kLine && units > 1)) continue;
      const bool whole_sectors = row >= kLeastRow || channels == a_.channels;
      if (!whole_sectors && !backward_) continue;  // `whole` moves them twice as well in backward, not in forward
      for (int64_t blocks_per_sm = 2; blocks_per_sm > 0; --blocks_per_sm) {
        const int64_t rank = 2 * whole_sectors + blocks_per_sm;
        const NormSplit next = streamed(channels, blocks_per_sm);
        if (!next.refusal.empty() || rank < best_rank) continue;
        best = next;
        best_rank = rank;
      }
    }
    if (best.refusal.empty() && blocks(best) < 2 * best.stream_blocks) {
      best.refusal = "its " + std::to_string(blocks(best)) + " chunks are less than two for every block of a GPU";
    }
    return best;
  }

  // For images too large for two blocks on an SM. Rows of whole sectors where two fit there, and the widest up to a
  // line that leave every SM a block.
  NormSplit clustered() const {
    NormSplit best;
    best.refusal = "clusters are for compute capability 9.0";
    if (device_.arch != 90) return best;
    best.refusal = "its channels are no whole 16-byte vectors";
    if (!vector_) return best;
    const int64_t run = ceil_div(pixels(), kNormCluster), tensors = backward_ ? 2 : 1;
    best.refusal = "two blocks on an SM hold all pixels of their chunks";
    if (2 * tensors * pixels() * std::max(kSector, unit_ * element_) <= device_.shared_limit) return best;
    best.refusal = "the shared memory of a cluster does not hold the pixels of its chunks";
    if (ceil_div(pixels(), run) != kNormCluster) return best;
    int64_t best_rank = 0;
    for (int64_t units = 1; units * unit_ <= a_.channels; ++units) {
      const int64_t channels = units * unit_, row = channels * element_;
      if (a_.channels % channels || (row > kLine && units > 1)) continue;
      const NormSplit next = laid_out(channels, run, static_cast<int>(tensors), true);
      const int64_t rank = 2 * std::min<int64_t>(blocks_on_an_sm(next), 2) + (row % kLeastRow == 0);
      const bool starves = best_rank > 0 && blocks(next) * kNormCluster < device_.multiprocessors;
      if (!next.refusal.empty() || rank < best_rank || starves) continue;
      best = next;
      best_rank = rank;
    }
    return best;
  }

  NormSplit hopper() const {
    const NormSplit streaming = stream();
    if (streaming.refusal.empty() && blocks_on_an_sm(streaming) >= 2) return streaming;
    const NormSplit portable = split();
    const bool wide = portable.chunk_channels * element_ >= kLeastRow || portable.chunks == 1;
    if (portable.whole && wide && blocks_on_an_sm(portable) >= 2) return portable;
    const NormSplit clusters = clustered();
    if (clusters.refusal.empty()) return clusters;
    return streaming.refusal.empty() ? streaming : portable;
  }

 private:
  int64_t blocks_on_an_sm(const NormSplit& s) const {
    return (device_.shared_limit + kBlockShared) / (s.shared_bytes + kStaticShared + kBlockShared);
  }

  NormSplit streamed(int64_t channels, int64_t blocks_per_sm) const {
    const int tensors = backward_ ? 2 : 1;
    NormSplit s = laid_out(channels, pixels(), tensors);
    if (!s.refusal.empty()) return s;
    s.whole = true;
    s.threads = backward_ ? kBackwardThreadsPerSm / blocks_per_sm : kMostThreads;
    const int64_t vectors = channels / lane_channels_ * pixels();
    while (s.threads > kFewestThreads && s.threads * 2 > vectors) s.threads /= 2;
    lay_out_shared(s, 2);  // of x, or x and dy
    const int64_t taken = s.shared_bytes + kStaticShared + kBlockShared;
    if (taken * blocks_per_sm > device_.shared_limit + kBlockShared) s.refusal = "too large";
    // As many rounds as the blocks that run at once need, with equal shares.
    const int64_t slots = blocks_per_sm * device_.multiprocessors, rounds = ceil_div(blocks(s), slots);
    s.stream_blocks = std::max<int64_t>(1, ceil_div(blocks(s), std::max<int64_t>(rounds, 1)));
    return s;
  }

  int64_t pixels() const { return a_.height * a_.width; }
  int64_t blocks(const NormSplit& s) const { return a_.batch * s.chunks; }

  // The split with chunks of this many channels, runs of this many pixels, and `tensors` activations kept.
  NormSplit laid_out(int64_t chunk_channels, int64_t pixels_per_block, int tensors, bool cluster = false) const {
    NormSplit s;
    s.cluster = cluster;
    s.vector = vector_;
    s.tensors = tensors;
    s.chunk_channels = chunk_channels;
    s.chunks = a_.channels / chunk_channels;
    s.pixels_per_block = std::max<int64_t>(pixels_per_block, 1);
    s.splits = std::max<int64_t>(1, ceil_div(pixels(), s.pixels_per_block));
    const int64_t arrays = arrays_of(s);
    const int64_t tiles = tensors * s.pixels_per_block * chunk_channels * element_;
    const int64_t vectors = chunk_channels / lane_channels_;
    s.threads = threads_for(vectors, vectors * s.pixels_per_block, arrays + tiles, blocks(s) * s.splits);
    lay_out_shared(s, tensors);
    if (s.shared_bytes + kStaticShared > device_.shared_limit) {
      s.refusal = "shared memory does not hold the pixels of " + std::to_string(chunk_channels) + " channels";
    }
    return s;
  }

  // Bytes of a float for each channel; in a cluster also what its blocks read of each other: two sums, or three moments
  // of each norm group.
  int64_t arrays_of(const NormSplit& s) const {
    return (5 + (s.cluster ? backward_ ? 2 : 3 : 0)) * s.chunk_channels * 4;
  }

  // Where the parts of shared memory are, for this number of threads and of tiles.
  void lay_out_shared(NormSplit& s, int64_t tiles) const {
    const int64_t arrays = arrays_of(s), vectors = s.chunk_channels / lane_channels_;
    s.lanes_log2 = std::min(log2_at_least(vectors), log2_at_least(s.threads));
    const int64_t sums = 2, lanes = int64_t{1} << s.lanes_log2;
    const int64_t rows = lanes < kWarpThreads ? s.threads / kWarpThreads : s.threads / lanes;
    s.row_sums = round_up(arrays, 16);
    s.tile = s.row_sums + round_up(sums * rows * lanes * lane_channels_ * 4, 16);
    s.shared_bytes = s.tile + tiles * s.pixels_per_block * s.chunk_channels * element_;
  }

  int64_t threads_for(int64_t vectors_per_pixel, int64_t vectors, int64_t shared, int64_t blocks) const {
    const int64_t per_sm = backward_ ? kBackwardThreadsPerSm : kForwardThreadsPerSm;
    const int64_t fit = device_.shared_limit / std::max<int64_t>(shared, 1);
    const int64_t blocks_per_sm = std::max<int64_t>(1, std::min(fit, ceil_div(blocks, device_.multiprocessors)));
    const int64_t wanted = std::max(ceil_div(vectors, kVectorsPerThread), vectors_per_pixel);
    const auto running = [&](int64_t threads) { return threads * std::min(blocks_per_sm, per_sm / threads); };
    int64_t threads = kFewestThreads;
    while (threads < kMostThreads && threads < wanted && running(2 * threads) * 2 >= running(threads) * 3) threads *= 2;
    return threads;
  }

  // All pixels of a chunk in one block. Chunks grow to whole lines of memory while several blocks still fit on an SM
  // and every SM has a block.
  NormSplit best_whole(int tensors) const {
    NormSplit best = laid_out(unit_, pixels(), tensors);
    for (int64_t units = 2; units * unit_ <= a_.channels && units * unit_ * element_ <= kLine; ++units) {
      if (a_.channels % (units * unit_)) continue;
      const NormSplit next = laid_out(units * unit_, pixels(), tensors);
      const bool narrow = best.chunk_channels * element_ < kSector;
      if (next.shared_bytes * (narrow ? kBlocksPerSm - 1 : kBlocksPerSm) > device_.shared_limit) break;
      if (blocks(next) < (narrow ? 1 : 2) * device_.multiprocessors) break;
      best = next;
    }
    best.whole = true;
    return best;
  }

  // Whether blocks are so few and large that a second launch costs less than idle SMs.
  bool starves(const NormSplit& s) const {
    return blocks(s) * 4 <= device_.multiprocessors && s.shared_bytes > 2 * kRunBytes;
  }

  // Whether the forward's rows are shorter than what memory delivers, as wider ones would not fit beside each other:
  // its bytes are fetched and written back twice. Two launches fetch x twice and write once.
  bool halves_sectors(const NormSplit& s) const {
    const int64_t next = 2 * s.chunk_channels;
    return !backward_ && s.chunk_channels * element_ < kLeastRow && a_.channels % next == 0 &&
           blocks(s) >= 2 * device_.multiprocessors &&
           laid_out(next, pixels(), s.tensors).shared_bytes * (kBlocksPerSm - 1) > device_.shared_limit;
  }

  // Runs of pixels of at most kRunBytes, shorter where there would be too few blocks.
  NormSplit best_runs() const {
    int64_t channels = unit_;
    for (int64_t units = 2; units * unit_ <= a_.channels && units * unit_ * element_ <= kLine; ++units) {
      if (a_.channels % (units * unit_) == 0) channels = units * unit_;
    }
    const int64_t pixel_bytes = channels * element_;
    const int64_t blocks_per_run = std::max<int64_t>(1, a_.batch * (a_.channels / channels));
    const int64_t wanted_runs = ceil_div(4 * device_.multiprocessors, blocks_per_run);
    const int64_t for_parallelism = std::max(ceil_div(pixels(), wanted_runs), ceil_div(kRunBytes / 8, pixel_bytes));
    const int64_t for_space = std::max<int64_t>(1, kRunBytes / pixel_bytes);
    int64_t run = std::min({for_parallelism, for_space, std::max<int64_t>(pixels(), 1)});
    NormSplit s = laid_out(channels, run, backward_ ? 0 : 1);
    while (!s.refusal.empty() && run > 1) s = laid_out(channels, run /= 2, s.tensors);
    return s.refusal.empty() || channels == unit_ ? s : laid_out(unit_, 1, s.tensors);
  }

  const NormArguments& a_;
  const Device& device_;
  bool backward_, vector_;
  int64_t element_, lane_channels_, unit_;
};

}  // namespace

NormSplit stream_group_norm(const NormArguments& arguments, const Device& device, bool backward, bool aligned) {
  return Splitter(arguments, device, backward, aligned).stream();
}

NormSplit cluster_group_norm(const NormArguments& arguments, const Device& device, bool backward, bool aligned) {
  return Splitter(arguments, device, backward, aligned).clustered();
}

NormSplit hopper_group_norm(const NormArguments& arguments, const Device& device, bool backward, bool aligned) {
  return Splitter(arguments, device, backward, aligned).hopper();
}

NormSplit split_group_norm(const NormArguments& arguments, const Device& device, bool backward, bool aligned) {
  return Splitter(arguments, device, backward, aligned).split();
}

}  // namespace tdc
