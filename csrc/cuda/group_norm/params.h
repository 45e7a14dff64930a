// What the group norm kernels receive. Activations are (batch, pixels, channels), dense. Of x and dx the channels from
// x_channels on lie in tensors of their own, x2 and dx2.
#pragma once

namespace tdc {

struct GroupNormParams {
  const void* x;
  const void* weight;  // (num_experts, channels)
  const void* bias;
  const void* scale;  // (batch, channels) or null, as are shift, dscale, dshift; rows may lie further apart
  const void* shift;
  void* y;
  float* mean;  // (batch, norm_groups)
  float* rstd;
  const void* dy;
  void* dx;       // null: not wanted, as are the other gradients
  void* dweight;  // (num_experts, channels)
  void* dbias;
  void* dscale;
  void* dshift;
  float* partials;       // what the blocks of one sample pass to each other, see the kernels
  float* dweight_share;  // (batch, channels): each sample's terms of dweight and dbias; null: not wanted
  float* dbias_share;
  const int* offsets;       // (num_groups + 1)
  const int* weight_index;  // (num_groups)
  const int* widths;        // (num_groups) or null
  long long scale_stride;   // elements between rows
  long long shift_stride;
  int batch;
  int pixels;
  int channels;
  int norm_groups;
  int channels_per_group;
  int num_groups;
  int num_experts;
  float eps;
  int silu;
  // The part of one block: `chunk_channels` channels (whole norm groups) of `pixels_per_block` pixels of one sample.
  // Block x takes chunk x % chunks of sample x / chunks; block y takes pixels from y * pixels_per_block.
  int chunks;
  int chunk_channels;
  int pixels_per_block;
  int splits;      // runs of pixels that a sample is split into
  int lanes_log2;  // 2^lanes_log2 neighbouring threads read one pixel, a vector each
  // Byte offsets into shared memory.
  int channel_arrays;  // float per channel of the chunk, one array after the other
  int row_sums;        // scratch of the sums over threads
  int tile;            // the block's activations, x and then dy
  int copies_all;      // copies of dead channels, too, which so need not wait until it is known which are dead
  int keeps_dy;        // 0: too large, dy is read twice; what a block has just read is still in the L2 cache
  // The second input and its gradient, and the channels of the first.
  const void* x2;
  void* dx2;
  int x_channels;
  // (num_experts, norm_groups), zeros but while backward runs, of which chunks are counted; forward writes the zeros.
  // Null: dweight and dbias are summed by a launch of their own.
  int* counters;
  int num_counters;
};

}  // namespace tdc
