#include "cuda/group_norm/launch.h"

#include <initializer_list>
#include <stdexcept>

#include "cuda/group_norm/params.h"
#include "cuda/group_norm/split.h"

namespace tdc {
namespace {

constexpr int64_t kMostInt = 2147483647;
constexpr unsigned kSumThreads = 512, kSumChannels = 32;
// With more samples, which may all be one expert's, a warp takes longer to add them up than a launch.
constexpr int64_t kMostSummedAtOnce = 256;

// Elements of a chunk of which it costs less to read dead ones than to wait until it is known which are dead.
constexpr int64_t kMostCopiedDead = 4096;

bool all_aligned(std::initializer_list<uintptr_t> addresses) {
  for (const uintptr_t address : addresses) {
    if (address % 16) return false;
  }
  return true;
}

const char* dtype_name(int dtype) { return dtype == 0 ? "fp32" : dtype == 1 ? "bf16" : "fp16"; }

std::string shapes_of(const NormArguments& a) {
  const auto text = [](int64_t n) { return std::to_string(n); };
  return "x (" + text(a.batch) + ", " + text(a.channels) + ", " + text(a.height) + ", " + text(a.width) + ") " +
         dtype_name(a.dtype) + (a.x2_channels ? ", the last " + text(a.x2_channels) + " channels in x2, " : ", ") +
         text(a.num_norm_groups) + " norm groups, weight (" + text(a.num_experts) + ", " + text(a.channels) + "), " +
         text(a.num_groups) + " groups";
}

// Sizes that do not fit the kernels' 32-bit numbers, or make no sense.
std::string bad_sizes(const NormArguments& a) {
  if (a.dtype < 0 || a.dtype > 2) return "unknown dtype code " + std::to_string(a.dtype);
  if (a.batch < 0 || a.height < 0 || a.width < 0 || a.channels < 1 || a.num_groups < 1 || a.num_experts < 1) {
    return "negative or empty sizes";
  }
  if (a.num_norm_groups < 1 || a.channels % a.num_norm_groups) return "norm groups that do not divide the channels";
  if (a.x2_channels < 0 || a.x2_channels >= a.channels) return "x2 without channels, or with all of them";
  if (a.num_experts > 65535) return "more than 65535 experts";
  if (a.num_experts > kMostInt / a.num_norm_groups) return "too large for 32 bits";
  if (a.batch > kMostInt / a.channels || a.height * a.width > kMostInt / a.channels) return "too large for 32 bits";
  return "";
}

NormSplit split_of(const NormArguments& a, const Device& device, bool backward, bool aligned) {
  return (a.streamed ? hopper_group_norm : split_group_norm)(a, device, backward, aligned);
}

NormSplit forward_split(const NormArguments& a, const Device& device) {
  return split_of(a, device, false, all_aligned({a.x, a.x2, a.y}));
}

NormSplit backward_split(const NormBackwardArguments& a, const Device& device) {
  return split_of(a, device, true, all_aligned({a.x, a.x2, a.dy, a.dx, a.dx2}));
}

bool one_launch(const NormSplit& s) { return s.whole || s.cluster; }

// Of the workspace, by which two launches are connected.
int64_t moment_floats(const NormArguments& a, const NormSplit& s) {
  return one_launch(s) ? 0 : a.batch * s.splits * a.num_norm_groups * 3;
}

int64_t sum_floats(const NormArguments& a, const NormSplit& s) {
  return one_launch(s) ? 0 : a.batch * s.splits * 2 * a.channels;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

GroupNormParams params_of(const NormArguments& a, const NormSplit& s) {
  GroupNormParams p{};
  p.x = at<const void>(a.x);
  p.weight = at<const void>(a.weight);
  p.bias = at<const void>(a.bias);
  p.scale = at<const void>(a.scale);
  p.shift = at<const void>(a.shift);
  p.y = at<void>(a.y);
  p.mean = at<float>(a.mean);
  p.rstd = at<float>(a.rstd);
  p.offsets = at<const int>(a.offsets);
  p.weight_index = at<const int>(a.weight_index);
  p.widths = at<const int>(a.widths);
  p.partials = at<float>(a.workspace);
  p.scale_stride = a.scale_stride < 0 ? a.channels : a.scale_stride;
  p.shift_stride = a.shift_stride < 0 ? a.channels : a.shift_stride;
  p.batch = static_cast<int>(a.batch);
  p.pixels = static_cast<int>(a.height * a.width);
  p.channels = static_cast<int>(a.channels);
  p.norm_groups = static_cast<int>(a.num_norm_groups);
  p.channels_per_group = static_cast<int>(a.channels / a.num_norm_groups);
  p.num_groups = static_cast<int>(a.num_groups);
  p.num_experts = static_cast<int>(a.num_experts);
  p.eps = static_cast<float>(a.eps);
  p.silu = a.silu;
  p.chunks = static_cast<int>(s.chunks);
  p.chunk_channels = static_cast<int>(s.chunk_channels);
  p.pixels_per_block = static_cast<int>(s.pixels_per_block);
  p.splits = static_cast<int>(s.splits);
  p.lanes_log2 = s.lanes_log2;
  p.channel_arrays = 0;
  p.row_sums = static_cast<int>(s.row_sums);
  p.tile = static_cast<int>(s.tile);
  p.copies_all = !a.widths || s.pixels_per_block * s.chunk_channels <= kMostCopiedDead;
  p.keeps_dy = s.tensors == 2;
  p.x2 = at<const void>(a.x2);
  p.x_channels = static_cast<int>(a.channels - a.x2_channels);
  p.counters = at<int>(a.counters);
  p.num_counters = a.counters ? static_cast<int>(a.num_experts * a.num_norm_groups) : 0;
  return p;
}

Launch launch_stage(const char* stage, const NormArguments& a, const NormSplit& s, const GroupNormParams& p,
                    int64_t splits, int64_t shared_bytes) {
  Launch launch;
  launch.kernel = std::string("tdc_group_norm_") + stage + "_" + dtype_name(a.dtype) +
                  (s.vector ? "_vector" : "_scalar") + (a.x2_channels ? "_two" : "");
  launch.grid[0] = static_cast<unsigned>(a.batch * s.chunks);
  launch.grid[1] = static_cast<unsigned>(splits);
  launch.grid[2] = 1;
  launch.threads = static_cast<unsigned>(s.threads);
  launch.shared_bytes = static_cast<unsigned>(shared_bytes);
  launch.params = bytes_of(p);
  launch.shapes = shapes_of(a);
  return launch;
}

Launch launch_expert_sums(const NormArguments& a, const GroupNormParams& p) {
  Launch launch;
  launch.kernel = std::string("tdc_group_norm_expert_sums_") + dtype_name(a.dtype);
  launch.grid[0] = static_cast<unsigned>((a.channels + kSumChannels - 1) / kSumChannels);
  launch.grid[1] = static_cast<unsigned>(a.num_experts);
  launch.grid[2] = 1;
  launch.threads = kSumThreads;
  launch.shared_bytes = 0;
  launch.params = bytes_of(p);
  launch.shapes = shapes_of(a);
  return launch;
}

// The blocks of a stream, a cluster for every chunk, or a block.
Launch launch_one(const std::string& prefix, const NormArguments& a, const NormSplit& s, const GroupNormParams& p) {
  const std::string stage = prefix + (s.cluster ? "cluster" : s.stream_blocks ? "stream" : "whole");
  Launch launch = launch_stage(stage.c_str(), a, s, p, s.splits, s.shared_bytes);
  if (s.stream_blocks) launch.grid[0] = static_cast<unsigned>(s.stream_blocks);
  return launch;
}

void require_served(const NormArguments& a, const std::string& refusal) {
  if (!refusal.empty()) throw std::invalid_argument("group_norm: " + refusal + ": " + shapes_of(a));
}

std::string refusal_of(const NormSplit& s) {
  if (!s.refusal.empty()) return s.refusal;
  return s.splits > 65535 ? "too many pixels" : "";
}

}  // namespace

std::string group_norm_refusal(const NormArguments& a, const Device& device, bool backward) {
  const std::string bad = bad_sizes(a);
  return bad.empty() ? refusal_of(split_group_norm(a, device, backward, all_aligned({a.x, a.x2, a.y}))) : bad;
}

std::string group_norm_hopper_form(const NormArguments& a, const Device& device, bool backward) {
  const std::string bad = bad_sizes(a);
  if (!bad.empty()) return bad;
  const bool aligned = all_aligned({a.x, a.x2, a.y});
  const NormSplit s = hopper_group_norm(a, device, backward, aligned);
  if (s.cluster) return "by clusters";
  if (s.stream_blocks) return "as a stream";
  return "in the portable form: it is no stream, " + stream_group_norm(a, device, backward, aligned).refusal +
         ", and not by clusters, " + cluster_group_norm(a, device, backward, aligned).refusal;
}

size_t group_norm_forward_workspace(const NormArguments& a, const Device& device) {
  require_served(a, bad_sizes(a));
  return moment_floats(a, forward_split(a, device)) * sizeof(float);
}

size_t group_norm_backward_workspace(const NormBackwardArguments& a, const Device& device) {
  require_served(a, bad_sizes(a));
  const int64_t shares = (a.dweight ? 1 : 0) + (a.dbias ? 1 : 0);
  return (sum_floats(a, backward_split(a, device)) + shares * a.batch * a.channels) * sizeof(float);
}

std::vector<Launch> launch_group_norm_forward(const NormArguments& a, const Device& device) {
  require_served(a, bad_sizes(a));
  if (a.batch == 0) return {};
  const NormSplit s = forward_split(a, device);
  require_served(a, refusal_of(s));
  const GroupNormParams p = params_of(a, s);
  if (one_launch(s)) return {launch_one("", a, s, p)};
  return {launch_stage("partial", a, s, p, s.splits, s.shared_bytes),
          launch_stage("apply", a, s, p, s.splits, s.row_sums)};  // needs the channel arrays alone
}

std::vector<Launch> launch_group_norm_backward(const NormBackwardArguments& a, const Device& device) {
  require_served(a, bad_sizes(a));
  const NormSplit s = backward_split(a, device);
  require_served(a, refusal_of(s));
  GroupNormParams p = params_of(a, s);
  p.dy = at<const void>(a.dy);
  p.dx = at<void>(a.dx);
  p.dx2 = at<void>(a.dx2);
  p.dweight = at<void>(a.dweight);
  p.dbias = at<void>(a.dbias);
  p.dscale = at<void>(a.dscale);
  p.dshift = at<void>(a.dshift);
  float* shares = p.partials + sum_floats(a, s);
  if (a.dweight) p.dweight_share = shares;
  if (a.dbias) p.dbias_share = shares + (a.dweight ? a.batch * a.channels : 0);
  const bool wants_sums = a.dweight || a.dbias;
  const bool sums_at_once = wants_sums && a.counters && a.batch > 0 && a.batch <= kMostSummedAtOnce;
  if (!sums_at_once) p.counters = nullptr;

  std::vector<Launch> launches;
  const bool wants_input = a.dx || a.dx2;
  const bool wants_any = wants_input || wants_sums || a.dscale || a.dshift;
  if (a.batch > 0 && wants_any) {
    if (one_launch(s)) {
      launches.push_back(launch_one("backward_", a, s, p));
    } else {
      launches.push_back(launch_stage("backward_partial", a, s, p, s.splits, s.shared_bytes));
      // Without dx and dx2 only the first run's block has something to write.
      launches.push_back(launch_stage("backward_apply", a, s, p, wants_input ? s.splits : 1, s.row_sums));
    }
  }
  if (wants_sums && !sums_at_once) launches.push_back(launch_expert_sums(a, p));
  return launches;
}

}  // namespace tdc
