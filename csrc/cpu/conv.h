// Routed 2-D convolution on the CPU: forward, dgrad and wgrad over samples sorted by group.
//
// Group g holds samples offsets[g] .. offsets[g + 1] and uses expert weight_index[g]; only its first in_widths[g] input
// and out_widths[g] output channels are live. Dead inputs are never read, dead outputs and gradients are exact zeros.
// Sums are fp32 whatever the dtype. No result depends on the number of threads, and what belongs to a sample (y, dx,
// dsample_bias) does not depend on the rest of its batch either: the order of a sum follows from shapes and widths.
//
// The input may be two tensors, x and x2, whose channels follow each other; in_channels and in_widths count both. With
// upsample = 2 every pixel of the input stands for 2 x 2 (nearest upsampling): where several taps of the filter meet
// the same pixel, their weights are added before they are multiplied, and in wgrad share the sum of their products.
//
// Words used throughout cpu/conv*:
//   panel        up to kPanelVectors vectors of adjacent channels of the result: the width of a register tile
//   tile         sums held in registers: some pixels (wgrad: input channels) by the channels of one panel
//   row tile     the tile of 8 adjacent pixels of a row, where the filter has three columns
//   flat tile    the tile of adjacent pixels by two panels, where the filter has one pixel and stride 1
//   chunk        pixels of one group that a task works on: whole samples, or a range of rows of one sample
//   block        wgrad: kDepthBlock adjacent input channels
//   weight tile  wgrad: a range of panels by a range of blocks of one expert's dweight, whose sums stay in the cache
//   split        wgrad: one of the tasks that divide the chunks of a weight tile, as in split-K
//   partial sums wgrad: the sums of one split
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace tdc {

struct Conv2dProblem {
  DType dtype;
  int64_t batch, height, width, in_channels, out_channels;  // height and width of the input before upsampling
  int64_t filter_height, filter_width, stride_height, stride_width, pad_height, pad_width;
  int64_t num_groups, num_experts;
  int64_t x2_channels;          // the last input channels, which x2 holds; 0: there is no x2
  int64_t upsample;             // 1 or 2
  int64_t weight_strides[5];    // in elements, of (expert, out channel, in channel, row, column)
  const int32_t* offsets;       // (num_groups + 1), from 0 to batch
  const int32_t* weight_index;  // (num_groups), null: group g uses expert g
  const int32_t* in_widths;     // (num_groups), null: all channels
  const int32_t* out_widths;    // (num_groups), null: all channels
  int threads;

  int64_t out_height() const { return (upsample * height + 2 * pad_height - filter_height) / stride_height + 1; }
  int64_t out_width() const { return (upsample * width + 2 * pad_width - filter_width) / stride_width + 1; }
  int64_t x_channels() const { return in_channels - x2_channels; }
  int64_t expert(int64_t group) const { return weight_index ? weight_index[group] : group; }
  int64_t live_in(int64_t group) const { return in_widths ? in_widths[group] : in_channels; }
  int64_t live_out(int64_t group) const { return out_widths ? out_widths[group] : out_channels; }

  // Throws std::invalid_argument when a size, an offset, an expert or a width is out of range.
  void check() const;
};

// The input of the forward and wgrad: dense NHWC, x2 null where there is none.
struct Conv2dInput {
  const void *x, *x2;
};

// Activations are dense NHWC. bias (experts, C_out), sample_bias (B, C_out), residual like y; each may be null.
void conv2d_forward(const Conv2dProblem& problem, const Conv2dInput& input, const void* weight, const void* bias,
                    const void* sample_bias, const void* residual, void* y);

// dx and dx2, like x and x2, are written completely.
void conv2d_dgrad(const Conv2dProblem& problem, const void* dy, const void* weight, void* dx, void* dx2);

// dweight has the strides of the weight; dbias (experts, C_out); dsample_bias (B, C_out). Each may be null; each is
// written completely. An expert that several groups use gets the sum over them, in group order.
void conv2d_wgrad(const Conv2dProblem& problem, const Conv2dInput& input, const void* dy, void* dweight, void* dbias,
                  void* dsample_bias);

}  // namespace tdc
