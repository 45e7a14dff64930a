// How group norm is divided among blocks: a function of sizes, alignment and the device.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/group_norm/launch.h"

namespace tdc {

constexpr int64_t kNormCluster = 4;  // blocks of a cluster, as in kernels.h

struct NormSplit {
  bool vector = false;  // 16-byte accesses
  bool whole = false;   // one launch, with all pixels of a chunk in one block
  int tensors = 0;      // activations kept in shared memory: x; in backward dy too, where it fits
  int64_t chunk_channels = 0, chunks = 0;
  int64_t pixels_per_block = 0, splits = 1;
  int64_t stream_blocks = 0;  // of a stream; 0: a block per chunk or run
  bool cluster = false;       // runs of the blocks of a cluster
  int lanes_log2 = 0;
  int64_t threads = 0;
  int64_t row_sums = 0, tile = 0, shared_bytes = 0;  // bytes: where the parts of shared memory start, and all of it
  std::string refusal;                               // not empty: no kernel fits
};

// aligned: all activation addresses are multiples of 16.
NormSplit split_group_norm(const NormArguments& arguments, const Device& device, bool backward, bool aligned);

// The same as a stream (stream.cuh). Refused where blocks would have less than two chunks each.
NormSplit stream_group_norm(const NormArguments& arguments, const Device& device, bool backward, bool aligned);

// The same by clusters (cluster.cuh).
NormSplit cluster_group_norm(const NormArguments& arguments, const Device& device, bool backward, bool aligned);

// As a stream where two of its blocks fit on an SM, so that one computes while the other copies; as split_group_norm
// says where two blocks fit that see all pixels; else by clusters.
NormSplit hopper_group_norm(const NormArguments& arguments, const Device& device, bool backward, bool aligned);

}  // namespace tdc
