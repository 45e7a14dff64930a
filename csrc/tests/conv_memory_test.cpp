// Memory that runs out: whichever allocation of a convolution fails, on whichever thread, the call throws bad_alloc and
// the next call is right. The other threads must not wait for what the failed one was to compute.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <thread>

#include "cpu/conv.h"
#include "check.h"

using namespace tdc_test;

namespace {

std::atomic<int64_t> allocations_left{std::numeric_limits<int64_t>::max()};

}  // namespace

// Takes the place of the C library's, from which the kernels take all memory that grows with a problem.
extern "C" void* aligned_alloc(size_t alignment, size_t size) noexcept {
  if (allocations_left.fetch_sub(1) == 1) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // until the others wait, if they do
    return nullptr;
  }
  void* memory = nullptr;
  return posix_memalign(&memory, alignment, size) == 0 ? memory : nullptr;
}

namespace {

// One expert with an upsampled image, whose taps are merged in memory of their own; every thread needs its panel.
struct Problem {
  explicit Problem(int64_t channels) : x(12 * 64 * channels, false), weight(24 * channels * 9, false) {
    p.batch = 12, p.height = p.width = 8, p.in_channels = channels, p.out_channels = 24;
    p.filter_height = p.filter_width = 3, p.stride_height = p.stride_width = 1, p.pad_height = p.pad_width = 1;
    p.upsample = 2, p.threads = 3, p.num_groups = p.num_experts = 1, p.offsets = offsets;
    const int64_t strides[5] = {24 * channels * 9, channels * 9, 9, 3, 1};
    std::memcpy(p.weight_strides, strides, sizeof strides);
    Random random(3);
    random.fill(x), random.fill(weight);
  }
  Problem(const Problem&) = delete;

  Tensor run(int operation) const {
    Tensor y(12 * 256 * 24, false);
    if (operation == 0) {
      tdc::conv2d_forward(p, {x.data(), nullptr}, weight.data(), nullptr, nullptr, nullptr, y.data());
      return y;
    }
    Tensor dy = y, result(operation == 1 ? x.size() : weight.size(), false);
    for (int64_t i = 0; i < dy.size(); ++i) dy.set(i, 1);
    if (operation == 1)
      tdc::conv2d_dgrad(p, dy.data(), weight.data(), result.data(), nullptr);
    else
      tdc::conv2d_wgrad(p, {x.data(), nullptr}, dy.data(), result.data(), nullptr, nullptr);
    return result;
  }

  const int32_t offsets[2] = {0, 12};
  tdc::Conv2dProblem p{};
  Tensor x, weight;
};

// Each attempt has more channels than the last, so that the memory that the threads keep does not suffice.
void any_allocation_may_fail(int operation, int64_t& channels) {
  int64_t failures_seen = 0;
  for (int64_t failing = 1; failing <= 12; ++failing) {
    const Problem problem(channels += 2);
    allocations_left = failing;
    try {
      problem.run(operation);
    } catch (const std::bad_alloc&) {
      ++failures_seen;
    }
    allocations_left = std::numeric_limits<int64_t>::max();
    const Tensor after = problem.run(operation);
    CHECK(after.same_bits(problem.run(operation)));
    for (int64_t i = 0; i < after.size(); ++i) CHECK(after[i] == after[i]);
  }
  std::printf("operation %d: %lld of 12 failed\n", operation, static_cast<long long>(failures_seen));
  CHECK(failures_seen > 0);
}

}  // namespace

int main() {
  if (!isa_available()) return kSkipped;
  alarm(100);  // ends a call that waits for ever
  int64_t channels = 8;
  for (int operation : {0, 1, 2}) any_allocation_may_fail(operation, channels);
  return report("conv_memory_test");
}
