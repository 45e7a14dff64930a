#include "cpu/group_norm_blocks.h"

namespace tdc {
namespace {

// Sums over each expert's samples, taken in sample order, one window of samples after the other.
class ExpertSums {
 public:
  ExpertSums(const GroupNormProblem& problem, const SampleView& view, const NormKernels& kernels, bool wanted)
      : p_(problem), view_(view), kernels_(kernels), wanted_(wanted) {
    if (wanted) total_ = std::make_unique<double[]>(2 * p_.num_experts * p_.channels);
  }

  // shares[b - begin]: `channels` terms of dweight, then as many of dbias.
  void add(int64_t begin, int64_t end, const SlotStorage<float>& shares) {
    if (!wanted_) return;
    const bool small = (end - begin) * p_.channels < 16384;
    parallel_for(p_.num_experts, small ? 1 : p_.threads, [&](int64_t e, int) {
      for (int64_t g = 0; g < p_.num_groups; ++g) {
        if (view_.expert(g) != e) continue;
        const int64_t first = std::max<int64_t>(begin, p_.offsets[g]), last = std::min<int64_t>(end, p_.offsets[g + 1]);
        for (int64_t b = first; b < last; ++b) {
          kernels_.accumulate(shares[b - begin], view_.live(g), total(e));
          kernels_.accumulate(shares[b - begin] + p_.channels, view_.live(g), total(e) + p_.channels);
        }
      }
    });
  }

  void write(void* dweight, void* dbias) const {
    if (!wanted_) return;
    for (int64_t e = 0; e < p_.num_experts; ++e) {
      if (dweight) kernels_.round(total(e), p_.channels, view_.row(dweight, e));
      if (dbias) kernels_.round(total(e) + p_.channels, p_.channels, view_.row(dbias, e));
    }
  }

 private:
  double* total(int64_t expert) const { return total_.get() + 2 * expert * p_.channels; }

  const GroupNormProblem& p_;
  const SampleView& view_;
  const NormKernels& kernels_;
  bool wanted_;
  std::unique_ptr<double[]> total_;
};

}  // namespace

void group_norm_backward(const GroupNormProblem& problem, const GroupNormInputs& in, const void* dy, const float* mean,
                         const float* rstd, const GroupNormGrads& grads) {
  problem.check();
  const NormKernels& kernels = TDC_ISA_CALL(norm_kernels, problem.dtype);
  const SampleView view(problem);
  const RowBlocks& blocks = view.blocks;
  const int64_t channels = problem.channels, norm_groups = problem.num_norm_groups;
  const bool wants_affine = grads.dweight || grads.dbias;

  // Each sample writes its terms of dweight and dbias; a window of samples bounds the memory for them.
  constexpr int64_t kShareFloats = 1 << 20;
  const int64_t window = std::min(problem.batch, std::max<int64_t>(1, kShareFloats / (2 * channels)));
  const BlockSchedule schedule(window, blocks.count, useful_threads(problem));
  const SlotStorage<float> shares(wants_affine ? window : 0, 2 * channels);
  const SlotStorage<float> block_sums(schedule.slots(), blocks.count * 2 * channels);
  const SlotStorage<double> sums(schedule.slots(), 2 * channels);
  const SlotStorage<float> factors(schedule.slots(), 6 * channels);
  // The gradient through SiLU is kept in dx between its two uses if a sample fits in cache. Otherwise it is computed
  // twice, which is cheaper than the memory traffic; bf16 would also round it.
  constexpr int64_t kKeptFloats = 1 << 17;
  const bool keeps_dz = grads.dx && (grads.dx2 || !problem.x2_channels) && problem.silu &&
                        problem.dtype == DType::kFloat32 && blocks.rows * channels <= kKeptFloats;
  ExpertSums experts(problem, view, kernels, wants_affine);

  const auto input_grad_tensor = [&](int i) { return i ? grads.dx2 : grads.dx; };
  const auto affine_of = [&](int64_t slot) {
    float* storage = factors[slot];
    return NormAffine{storage, storage + channels, storage + 2 * channels};
  };
  const auto input_grad_of = [&](int64_t slot) {
    float* storage = factors[slot] + 3 * channels;
    return NormInputGrad{storage, storage + channels, storage + 2 * channels};
  };
  const auto set_affine = [&](int64_t b, int64_t slot) {
    kernels.affine(view.layout(b), view.parameters(in, b), mean + b * norm_groups, rstd + b * norm_groups, nullptr,
                   affine_of(slot));
  };
  int64_t begin = 0;
  const auto gather = [&](int64_t b, int64_t k, int64_t slot, int) {
    const NormLayout layout = view.layout(b);
    if (layout.live == 0) return;
    float* out = block_sums[slot] + k * 2 * channels;
    for (int i = 0; i < view.num_parts(); ++i) {
      const NormPart part = view.part(b, i);
      const OutputRows kept = view.own_block(keeps_dz ? input_grad_tensor(i) : nullptr, b, k, part);
      kernels.backward_sums(view.own_block(i ? in.x2 : in.x, b, k, part), view.joint_block(dy, b, k, part), kept,
                            blocks.size(k), part, affine_of(slot), problem.silu, out, out + channels);
    }
  };
  const auto finish = [&](int64_t b, int64_t slot) {
    const NormLayout layout = view.layout(b);
    double* total = sums[slot];
    std::fill(total, total + 2 * channels, 0.0);
    for (int64_t k = 0; k < blocks.count && layout.live; ++k) {
      const float* part = block_sums[slot] + k * 2 * channels;
      kernels.accumulate(part, layout.live, total);
      kernels.accumulate(part + channels, layout.live, total + channels);
    }
    float* share = wants_affine ? shares[b - begin] : nullptr;
    const NormSampleGrads out{view.row(grads.dscale, b), view.row(grads.dshift, b), share,
                              share ? share + channels : nullptr};
    kernels.backward_factors(layout, view.parameters(in, b), rstd + b * norm_groups, blocks.rows, total,
                             total + channels, out, input_grad_of(slot));
  };
  const auto spread = [&](int64_t b, int64_t k, int64_t slot) {
    for (int i = 0; i < view.num_parts(); ++i) {
      if (!input_grad_tensor(i)) continue;
      const NormPart part = view.part(b, i);
      const OutputRows dx = view.own_block(input_grad_tensor(i), b, k, part);
      const InputRows upstream = keeps_dz ? InputRows{dx.at, dx.stride} : view.joint_block(dy, b, k, part);
      kernels.backward_apply(view.own_block(i ? in.x2 : in.x, b, k, part), upstream, dx, blocks.size(k), part,
                             affine_of(slot), input_grad_of(slot), problem.silu && !keeps_dz);
    }
  };
  for (; begin < problem.batch; begin += window) {
    const int64_t end = std::min(begin + window, problem.batch);
    schedule.run(begin, end, set_affine, gather, finish, spread);
    experts.add(begin, end, shares);
  }
  experts.write(grads.dweight, grads.dbias);
}

}  // namespace tdc
