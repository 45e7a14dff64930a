// Group normalisation with the affine of each sample's expert, an optional per-sample scale and shift, and an
// optional SiLU:  y = act((xhat * weight[e(b)] + bias[e(b)]) * (1 + scale[b]) + shift[b]).
//
// The input may be two tensors, x and x2, whose channels follow each other; norm groups may straddle the seam.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace tdc {

// What forward and backward share. Samples are sorted by group: group g owns [offsets[g], offsets[g + 1]).
struct GroupNormProblem {
  const int32_t* offsets = nullptr;       // (num_groups + 1)
  const int32_t* weight_index = nullptr;  // (num_groups): the group's expert; null: the identity
  const int32_t* widths = nullptr;        // (num_groups): live channels, whole norm groups; null: all
  DType dtype = DType::kFloat32;          // of every tensor except mean and rstd
  int64_t batch = 0;
  int64_t height = 0;
  int64_t width = 0;
  int64_t channels = 0;     // of x and x2 together
  int64_t x2_channels = 0;  // the last channels, which x2 holds; 0: there is no x2
  int64_t num_norm_groups = 1;
  double eps = 1e-5;
  bool silu = false;
  int64_t num_groups = 0;
  int64_t num_experts = 0;
  int threads = 1;

  int64_t pixels() const { return height * width; }
  int64_t x_channels() const { return channels - x2_channels; }
  int64_t channels_per_group() const { return channels / num_norm_groups; }

  // Throws std::invalid_argument when a size, an offset, an expert or a width is out of range.
  void check() const;
};

// Null stands for an absent tensor: a weight of ones, any other zeros.
struct GroupNormInputs {
  const void* x = nullptr;       // (batch, height, width, x_channels)
  const void* weight = nullptr;  // (num_experts, channels)
  const void* bias = nullptr;    // (num_experts, channels)
  const void* scale = nullptr;   // (batch, channels)
  const void* shift = nullptr;   // (batch, channels)
  const void* x2 = nullptr;      // (batch, height, width, x2_channels)
};

// A null output is not computed.
struct GroupNormGrads {
  void* dx = nullptr;       // (batch, height, width, x_channels)
  void* dweight = nullptr;  // (num_experts, channels)
  void* dbias = nullptr;    // (num_experts, channels)
  void* dscale = nullptr;   // (batch, channels)
  void* dshift = nullptr;   // (batch, channels)
  void* dx2 = nullptr;      // (batch, height, width, x2_channels)
};

// Writes all of y, and mean and rstd (batch, num_norm_groups) in fp32; both are zero for dead norm groups. Channels
// past the width are never read, and y is zero there. Throws std::invalid_argument on an impossible geometry, group,
// expert or width.
void group_norm_forward(const GroupNormProblem& problem, const GroupNormInputs& in, void* y, float* mean, float* rstd);

// Gradients of group_norm_forward from dy, with the mean and rstd that it wrote. Channels past the width, and experts
// that no sample uses, get zero. The sums over samples run in sample order, whatever the number of threads.
void group_norm_backward(const GroupNormProblem& problem, const GroupNormInputs& in, const void* dy, const float* mean,
                         const float* rstd, const GroupNormGrads& grads);

}  // namespace tdc
