// What the Hopper form of stride 2 receives. Tiles and shared memory are those of the form of rows. Convolutions of
// upsampled images run in it too, from the small image's side: merge.cuh.
#pragma once

#include "cuda/conv/hopper_rows_params.h"

namespace tdc {

// The filter is 3 x 3, or 4 x 4 of merged taps, with padding 1 and stride 2. The pixels of x, and in dgrad those of dx,
// fall into four planes by the parity of their row and column, number 2 * (row % 2) + column % 2. A tap meets one
// plane, in which the pixels that neighbouring pixels of y need are neighbours.
//
// The rows of a tile are the pixels of a box, line by line: box_width x box_height pixels of each of box_samples
// samples, all powers of 2, from 4 pixels on in both directions and at most 16 in a line. So a warp's 16 rows are of
// one sample.
constexpr int kHopperPlanes = 4;

// A map of each plane. Named one by one: gcc's __builtin_clear_padding (launch/launch.h) spoils arrays of structs.
struct HopperPlaneMaps {
  TensorMap even_even, even_odd, odd_even, odd_odd;  // rows, columns
};

// Forward and dgrad. In dgrad the source is dy, the result dx. Planes of y and dy are all the same: these have no
// parity. The residual is added in both.
struct alignas(64) ConvHopperStridedParams {
  HopperPlaneMaps source;    // boxes of a tile; dgrad: the first alone
  TensorMap weight;          // boxes of 64 x 64 channels of one tap: (C_in, taps, C_out, experts)
  HopperPlaneMaps result;    // boxes of 16 rows; forward: the first alone
  HopperPlaneMaps residual;  // the same, or without addresses
  const void* bias;          // (experts, channels of the result) or null
  const void* sample_bias;   // (B, channels of the result) or null
  ConvRouting routing;
  int source_channels, result_channels;
  int result_seam;      // there is no second input: the end
  int rows_per_sample;  // 1: tiles consist of samples
  int box_samples, box_height, box_width;
  int box_width_log2, box_pixels_log2;          // of the width; of the pixels of a sample
  int tiles_down, tiles_across, channel_tiles;  // of y or a plane of dx; of the channels of the result
  int filter;                                   // its height and width
  int stages;
  int has_residual;
};

}  // namespace tdc
