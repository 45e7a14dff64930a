#include "cuda/pack/launch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/pack/params.h"

namespace tdc {
namespace {

constexpr int64_t kThreads = 256, kMostInt = 2147483647, kMostGridRows = 65535;

std::string shapes_of(const PackArguments& a) {
  const auto text = [](int64_t n) { return std::to_string(n); };
  return "target (" + text(a.num_experts) + ", " + text(a.out_channels) + ", " + text(a.in_channels) + ", " +
         text(a.taps) + "), source channels (" + text(a.source_out_channels) + ", " + text(a.source_in_channels) +
         "), elements of " + text(a.element_size) + " bytes";
}

void check(const PackArguments& a) {
  const bool sizes = a.num_experts >= 0 && a.num_experts <= kMostGridRows && a.out_channels >= 0 &&
                     a.in_channels >= 0 && a.taps >= 0 && a.source_out_channels >= 0 && a.source_in_channels >= 0;
  const bool fits = sizes && std::max(a.source_out_channels, a.source_in_channels) <= kMostInt &&
                    a.taps <= kMostInt / std::max<int64_t>(a.in_channels, 1) &&
                    a.in_channels * a.taps <= kMostInt / std::max<int64_t>(a.out_channels, 1);
  if (!fits) throw std::invalid_argument("pack_experts: sizes out of range: " + shapes_of(a));
  if (a.element_size != 2 && a.element_size != 4 && a.element_size != 8) {
    throw std::invalid_argument("pack_experts: no kernel for this element size: " + shapes_of(a));
  }
}

}  // namespace

std::vector<Launch> launch_pack_experts(const PackArguments& a, const Device& device) {
  check(a);
  const int64_t elements = a.out_channels * a.in_channels * a.taps;  // of one expert
  if (elements == 0 || a.num_experts == 0) return {};
  PackParams p{};
  p.source = reinterpret_cast<const void*>(a.source);
  p.target = reinterpret_cast<void*>(a.target);
  p.out_order = reinterpret_cast<const int*>(a.out_order);
  p.in_order = reinterpret_cast<const int*>(a.in_order);
  p.out_widths = reinterpret_cast<const int*>(a.out_widths);
  p.in_widths = reinterpret_cast<const int*>(a.in_widths);
  p.num_experts = static_cast<int>(a.num_experts);
  p.out_channels = static_cast<int>(a.out_channels);
  p.in_channels = static_cast<int>(a.in_channels);
  p.taps = static_cast<int>(a.taps);
  p.source_out_channels = static_cast<int>(a.source_out_channels);
  p.source_in_channels = static_cast<int>(a.source_in_channels);
  p.taps_inside = a.target_tap_stride < a.target_in_stride;
  const int64_t source[4] = {a.source_expert_stride, a.source_out_stride, a.source_in_stride, a.source_tap_stride};
  const int64_t target[4] = {a.target_expert_stride, a.target_out_stride, a.target_in_stride, a.target_tap_stride};
  std::copy(source, source + 4, p.source_stride);
  std::copy(target, target + 4, p.target_stride);

  Launch launch;
  launch.kernel = "tdc_pack_experts_" + std::to_string(a.element_size);
  // At most a few waves; blocks loop over the rest.
  const int64_t most_blocks = std::max<int64_t>(1, 16 * device.multiprocessors);
  launch.grid[0] = static_cast<unsigned>(std::min((elements + kThreads - 1) / kThreads, most_blocks));
  launch.grid[1] = static_cast<unsigned>(a.num_experts);
  launch.grid[2] = 1;
  launch.threads = kThreads;
  launch.shared_bytes = 0;
  launch.params = bytes_of(p);
  launch.shapes = shapes_of(a);
  return {launch};
}

}  // namespace tdc
