// What a convolution in the Hopper form costs: clocks of the SM that is busy the longest when groups are even, by which
// planners choose tiles. The rates of products and of a tile's end are those that a prototype reached on an H200; those
// of loads and of sums that blocks exchange are estimates.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include "cuda/conv/hopper_params.h"
#include "cuda/conv/planning.h"

namespace tdc::conv {

// A kernel's tile, as far as its cost goes. A step multiplies 64 channels of one tap.
struct HopperTileCost {
  int64_t rows, columns;  // pixels, channels of the result
  int64_t source_bytes;   // loaded in a step, beside the weights
};

// How even groups fall into tiles.
struct HopperTiles {
  int64_t whole, part;  // tiles with all of their samples; with the rest of a group
  int64_t part_rows;    // of the latter
  int64_t steps;        // of each
};

// Channels of the inputs are loaded 64 at a time, of one input.
inline int64_t hopper_steps(int64_t taps, int64_t first, int64_t second) {
  return taps * (ceil_div(first, kHopperDepth) + ceil_div(second, kHopperDepth));
}

// Columns that the tiles of a result multiply on average, by the channels that each has and the columns that a product
// may have, from the fewest up to all.
inline int64_t hopper_mean_columns(const std::array<int, 3>& products, int64_t first, int64_t second) {
  const int64_t columns = products.back();
  int64_t sum = 0, tiles = 0;
  for (const int64_t channels : {first, second}) {
    const int64_t rest = channels % columns;
    sum += channels - rest + (rest ? *std::lower_bound(products.begin(), products.end(), rest) : 0);
    tiles += ceil_div(channels, columns);
  }
  return ceil_div(sum, tiles);
}

// An SM multiplies 2048 pairs in a clock. It reads 64 bytes of the L2 cache, of weights that other SMs read at the same
// time 24, and 128 of shared memory: a product's 64 rows and 64 columns take as long to read as to multiply, and fewer
// columns longer. A warpgroup without rows multiplies nothing.
inline int64_t hopper_step_clocks(const HopperTileCost& tile, int64_t live_rows) {
  const int64_t rows = 2 * live_rows <= tile.rows ? tile.rows / 2 : tile.rows, weights = tile.columns * kHopperRow;
  const int64_t read = (rows + rows / 64 * tile.columns) * kHopperRow;
  return std::max(
      {rows * tile.columns * kHopperDepth / 2048, read / 128, (tile.source_bytes + weights) / 64, weights / 24});
}

// Clusters of so many blocks that run at once, a block per SM. A cluster lies in one of the card's GPCs, which have 16
// or 18 SMs.
inline int64_t hopper_clusters(const Device& device, int64_t blocks) {
  return blocks <= 2 ? device.multiprocessors / blocks : device.multiprocessors / 16 * 16 / blocks;
}

// From the last product of a tile to the first of the next. The blocks of a cluster share the live rows, 16 at a time,
// and send each other the sums of those that they do not store, 12 bytes in a clock.
inline int64_t hopper_tile_clocks(const HopperTileCost& tile, int64_t blocks, int64_t live_rows) {
  const int64_t stored = 600 + tile.rows * tile.columns / 14 / blocks;
  if (blocks == 1) return stored;
  const int64_t own = ceil_div(live_rows, 16 * blocks) * 16 * tile.columns;  // results of a block
  return stored + 600 + own * 4 / 12 * (blocks - 1);
}

// Of tiles that clusters of so many blocks compute; what these send each other counts as that of whole tiles. Cluster 0
// takes every n-th of n clusters, those with all of their samples first.
inline int64_t hopper_clocks(const HopperTileCost& tile, const HopperTiles& tiles, const Device& device,
                             int64_t blocks) {
  const int64_t clusters = hopper_clusters(device, blocks), steps = ceil_div(tiles.steps, blocks);
  if (clusters == 0) return std::numeric_limits<int64_t>::max();
  const int64_t whole = ceil_div(tiles.whole, clusters), part = ceil_div(tiles.whole + tiles.part, clusters) - whole;
  return whole * steps * hopper_step_clocks(tile, tile.rows) +
         part * steps * hopper_step_clocks(tile, tiles.part_rows) +
         (whole + part) * hopper_tile_clocks(tile, blocks, tile.rows);
}

// Samples of a group when groups are even.
inline int64_t even_groups(const ConvArguments& a) { return std::max<int64_t>(1, std::min(a.num_groups, a.batch)); }
inline int64_t even_samples(const ConvArguments& a) { return ceil_div(a.batch, even_groups(a)); }

}  // namespace tdc::conv
