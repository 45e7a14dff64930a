// What the convolution kernels receive, as plain data that the host fills, and the tile shapes that both must agree on.
#pragma once

namespace tdc {

// A block computes kRows x kColumns of the result of an implicit matrix product, every warp 32 columns of it.
struct Tile128 {
  static constexpr int kRows = 128, kColumns = 128, kWarpRows = 64, kThreads = 256;
};
struct Tile64 {
  static constexpr int kRows = 64, kColumns = 64, kWarpRows = 32, kThreads = 128;
};

// Terms of the sum that one pipeline stage holds.
constexpr int kConvDepth = 32;

// Stages in flight: as many as let conv_blocks_per_sm blocks share 164 KB of shared memory.
constexpr int conv_stages(int element_bytes) { return element_bytes == 2 ? 4 : 3; }

// Blocks that share an SM, one loading while another multiplies: caps their registers at 128 per thread. The larger
// tile in fp32 takes 96 KB, so one block fills an SM, also on GPUs with 100 KB.
template <class Tile>
constexpr int conv_blocks_per_sm(int element_bytes) {
  return Tile::kThreads == 256 ? (element_bytes == 2 ? 2 : 1) : (element_bytes == 2 ? 4 : 3);
}

// Dynamic shared memory of a kernel.
template <class Tile>
constexpr int conv_shared_bytes(int element_bytes) {
  return conv_stages(element_bytes) * (Tile::kRows + Tile::kColumns) * kConvDepth * element_bytes;
}

// Quotients of 31-bit numbers by a fixed divisor: divisor 1, or (n * multiplier) >> 32 >> shift.
struct FastDivisor {
  unsigned divisor, multiplier, shift;
};

// Where the samples of a group begin, which expert they use, how many channels are live. These numbers are in device
// memory and are clamped before use.
struct ConvRouting {
  const int* offsets;       // (num_groups + 1)
  const int* weight_index;  // (num_groups), null: group g uses expert g
  const int* in_widths;     // (num_groups), null: all channels
  const int* out_widths;    // (num_groups), null: all channels
  int batch, num_groups, num_experts;
};

struct ConvGeometry {
  int height, width, in_channels;           // of x, and of x2 with it
  int out_height, out_width, out_channels;  // of y
  int filter_height, filter_width, stride_height, stride_width, pad_height, pad_width;
  int x_channels;     // of x alone: the input channels from here on are those of x2
  int upsample_log2;  // 1: every pixel of the input stands for 2 x 2, which stride, padding and filter refer to
};

// Forward and dgrad. Activations are NHWC, weights [expert, C_out, R, S, C_in].
struct ConvImageParams {
  const void* source;  // forward: x; dgrad: dy
  const void* weight;
  const void* bias;         // (experts, C_out) or null
  const void* sample_bias;  // (B, C_out) or null
  const void* residual;     // like y or null
  void* result;             // forward: y; dgrad: dx
  const int* tiles;         // the rows (group, first sample, samples) of the level that this launch uses
  ConvRouting routing;
  ConvGeometry geometry;
  int pixel_tiles;      // blocks that share the pixels of one row of `tiles`
  int channel_tiles;    // blocks that share the channels of the result; in dgrad those of dx come before those of dx2
  int vector_result;    // everything that the epilogue touches allows 16-byte accesses
  const void* source2;  // forward: x2
  void* result2;        // dgrad: dx2
};

// 16-byte chunks of channels that a block takes which sums dy for dbias: few, as these blocks run last.
constexpr int kBiasSumChunks = 4;

// wgrad: one block sums one split of the pixels for one tile of (C_out, C_in) at one tap of one expert.
struct ConvWgradParams {
  const void* x;
  const void* dy;
  void* dweight;    // written when splits == 1
  float* partials;  // (splits, experts, C_out, R, S, C_in), written when splits > 1
  ConvRouting routing;
  ConvGeometry geometry;
  FastDivisor by_pixels, by_width;  // out_height * out_width; out_width
  int splits;
  int out_tiles, in_tiles;  // tiles along C_out, C_in; those of x come before those of x2
  int vector_result;        // dweight allows 16-byte stores
  const void* x2;
  // Blocks from weight_blocks on sum dy for dbias: one split of one expert, kBiasSumChunks chunks of channels.
  int weight_blocks;
  int bias_tiles;        // along C_out
  void* dbias;           // (experts, C_out), written when splits == 1
  float* bias_partials;  // (splits, experts, C_out), written when splits > 1
  int vector_grads;      // dy allows 16-byte loads
};

// Threads per block of the kernels below.
constexpr int kConvSumThreads = 256;

// Weights with merged taps (merge.cuh).
constexpr int kMergeChannels = 32;
struct ConvMergeParams {
  const void* weight;  // (experts, C_out, R, S, C_in)
  void* merged;        // (experts, C_in, R + 1, S + 1, C_out)
  int in_channels, out_channels, filter_height, filter_width;
  int in_tiles, out_tiles;  // blocks along C_in and C_out
};

// dweight = the sum of `splits` arrays of `count` elements, in order, and dbias that of arrays of `bias_count`
// elements.
struct ConvReduceParams {
  const float* partials;
  void* dweight;
  long long count;
  int splits;
  const float* bias_partials;
  void* dbias;
  long long bias_count;  // 0: dbias is not wanted
};

// Sums of dy over the pixels of every sample. A block takes kSampleSumChunks 16-byte chunks of channels of one sample.
constexpr int kSampleSumChunks = 8;
struct ConvSampleSumParams {
  const void* dy;
  void* dsample_bias;  // (B, C_out) or null
  float* sums;         // the same in fp32, for the sums per expert, or null
  ConvRouting routing;
  int pixels, channels;
  int channel_tiles;  // blocks that share the channels of a sample
  int vector_source;  // dy allows 16-byte loads
};

// dbias = the sums of all samples that use an expert. A block takes kExpertSumChannels channels of one expert.
constexpr int kExpertSumChannels = 32;
struct ConvExpertSumParams {
  const float* sums;  // (B, C_out)
  void* dbias;        // (experts, C_out)
  ConvRouting routing;
  int channels;
  int channel_tiles;
};

}  // namespace tdc
