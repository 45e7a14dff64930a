#include <cmath>

#include "cpu/group_norm_blocks.h"

namespace tdc {
namespace {

// Combines the moments of a sample's blocks in order (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise
// algorithm for computing sample variances"), block k being moments[k * 2 * groups], and leaves them in block 0.
void merge_blocks(double* moments, const RowBlocks& blocks, const NormLayout& layout) {
  const int64_t groups = layout.groups();
  double* mean = moments;
  double* squares = moments + groups;
  double seen = static_cast<double>(blocks.size(0));
  for (int64_t k = 1; k < blocks.count; ++k) {
    const double* block_mean = moments + k * 2 * groups;
    const double* block_squares = block_mean + groups;
    const double rows = static_cast<double>(blocks.size(k));
    const double share = rows / (seen + rows);
    const double between = seen * share * static_cast<double>(layout.per_group);
    for (int64_t g = 0; g < groups; ++g) {
      const double difference = block_mean[g] - mean[g];
      mean[g] += difference * share;
      squares[g] += block_squares[g] + difference * difference * between;
    }
    seen += rows;
  }
}

}  // namespace

void group_norm_forward(const GroupNormProblem& problem, const GroupNormInputs& in, void* y, float* mean, float* rstd) {
  problem.check();
  const NormKernels& kernels = TDC_ISA_CALL(norm_kernels, problem.dtype);
  const SampleView view(problem);
  const RowBlocks& blocks = view.blocks;
  const int64_t channels = problem.channels, norm_groups = problem.num_norm_groups;
  const BlockSchedule schedule(problem.batch, blocks.count, useful_threads(problem));
  const SlotStorage<float> scratch(schedule.threads(), 3 * channels);
  const SlotStorage<double> moments(schedule.slots(), blocks.count * 2 * norm_groups);
  const SlotStorage<float> affines(schedule.slots(), 3 * channels + norm_groups);

  const auto affine_of = [&](int64_t slot) {
    float* storage = affines[slot];
    return NormAffine{storage, storage + channels, storage + 2 * channels};
  };
  const auto block_moments = [&](int64_t b, int64_t k, int64_t slot, int thread) {
    const NormLayout layout = view.layout(b);
    if (layout.live == 0) return;
    double* out = moments[slot] + k * 2 * layout.groups();
    const NormPart parts[2] = {view.part(b, 0), view.part(b, 1)};
    const InputRows x[2] = {view.own_block(in.x, b, k, parts[0]), view.own_block(in.x2, b, k, parts[1])};
    kernels.moments(x, parts, view.num_parts(), blocks.size(k), layout, scratch[thread], out, out + layout.groups());
  };
  const auto statistics = [&](int64_t b, int64_t slot) {
    const NormLayout layout = view.layout(b);
    const int64_t groups = blocks.count ? layout.groups() : 0;
    float* sample_mean = mean + b * norm_groups;
    float* sample_rstd = rstd + b * norm_groups;
    double* merged = moments[slot];
    float* mean_error = affines[slot] + 3 * channels;
    if (groups) merge_blocks(merged, blocks, layout);
    const double count = static_cast<double>(blocks.rows) * static_cast<double>(layout.per_group);
    for (int64_t g = 0; g < groups; ++g) {
      sample_mean[g] = static_cast<float>(merged[g]);
      mean_error[g] = static_cast<float>(sample_mean[g] - merged[g]);
      sample_rstd[g] = static_cast<float>(1.0 / std::sqrt(merged[groups + g] / count + problem.eps));
    }
    std::fill(sample_mean + groups, sample_mean + norm_groups, 0.0f);
    std::fill(sample_rstd + groups, sample_rstd + norm_groups, 0.0f);
    if (groups) kernels.affine(layout, view.parameters(in, b), sample_mean, sample_rstd, mean_error, affine_of(slot));
  };
  const auto normalize = [&](int64_t b, int64_t k, int64_t slot) {
    for (int i = 0; i < view.num_parts(); ++i) {
      const NormPart part = view.part(b, i);
      kernels.normalize(view.own_block(i ? in.x2 : in.x, b, k, part), view.joint_block(y, b, k, part), blocks.size(k),
                        part, affine_of(slot), problem.silu);
    }
  };
  const auto nothing = [](int64_t, int64_t) {};
  schedule.run(0, problem.batch, nothing, block_moments, statistics, normalize);
}

}  // namespace tdc
