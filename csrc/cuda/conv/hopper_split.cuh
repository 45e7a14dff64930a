// The depth of a tile, split over a cluster of blocks: which steps are a block's, and how the sums of all become one.
//
// A step is 64 channels of one tap; block r has steps r / kSplit to (r + 1) / kSplit of them. Each warp's 16 rows
// belong to one block: the others store their sums of them into its shared memory, and it adds all in the order of the
// blocks, whichever of them it is itself. So the result depends neither on timing nor on which rows of a tile a sample
// has. Warps belong to the blocks in turn, so that these share a tile of few rows, too.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_rows_epilogue.cuh"
#include "cuda/conv/hopper_rows_params.h"

namespace tdc {

template <class Tile>
class HopperSplit {
  static constexpr int kSplit = Tile::kSplit, kSums = Tile::kColumns / 2;

 public:
  // Of one of the eight warps that multiply.
  __device__ __forceinline__ HopperSplit(const HopperRowsShared<Tile>& shared, int warp)
      : shared_(shared), warp_(warp), rank_(rank()) {}

  __device__ __forceinline__ static int rank() { return kSplit == 1 ? 0 : cluster_rank(); }
  // The first step of a block, of so many.
  __device__ __forceinline__ static int first(int steps, int rank) { return steps * rank / kSplit; }

  // The block that stores a warp's rows; whether it is this one.
  __device__ __forceinline__ static int owner_of(int warp) { return warp % kSplit; }
  __device__ __forceinline__ bool own() const { return rank_ == owner(); }

  // Adds the sums of all blocks up, in the one whose rows they are.
  __device__ __forceinline__ void combine(int steps, float (&sums)[kSums]) {
    if (own()) {
      add(steps, sums);
    } else {
      send(sums);
    }
    phase_ ^= 1;
  }

 private:
  __device__ __forceinline__ int owner() const { return owner_of(warp_); }
  __device__ __forceinline__ static bool has_steps(int steps, int rank) {
    return first(steps, rank) < first(steps, rank + 1);
  }

  // Where the warp's sums of another block lie in the owner's shared memory: four of each lane, then the next four.
  __device__ __forceinline__ unsigned char* slot(int from, int lane) const {
    const int number = warp_ / kSplit * (kSplit - 1) + from - (from > owner() ? 1 : 0);
    return shared_.parts + number * Tile::kWarpSumBytes + lane * 16;
  }

  __device__ __forceinline__ void send(const float (&sums)[kSums]) const {
    HopperRowsControl& c = *shared_.control;
    if (!TDC_PLANTED(HOPPER_NO_PART_WAIT)) mbarrier_wait_cluster(&c.part_empty[warp_], phase_ ^ 1);
    unsigned char* to = cluster_shared(slot(rank_, threadIdx.x % 32), owner());
#pragma unroll
    for (int j = 0; j < kSums; j += 4) {
      const float4 four = make_float4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3]);
      *reinterpret_cast<float4*>(to + j * 128) = four;
    }
    warp_sync();
    if (threadIdx.x % 32 == 0) mbarrier_arrive_at(&c.part_full[warp_], owner());
  }

  __device__ __forceinline__ void add(int steps, float (&sums)[kSums]) const {
    HopperRowsControl& c = *shared_.control;
    const int lane = threadIdx.x % 32;
    if (!TDC_PLANTED(HOPPER_NO_PART_FULL_WAIT)) mbarrier_wait_cluster(&c.part_full[warp_], phase_);
#pragma unroll
    for (int j = 0; j < kSums; j += 4) {
      float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kSplit; ++i) {
        const int from = TDC_PLANTED(HOPPER_OWN_PART_FIRST) ? (rank_ + i) % kSplit : i;
        if (!has_steps(steps, from)) continue;
        if (from == rank_) {
          total[0] += sums[j], total[1] += sums[j + 1], total[2] += sums[j + 2], total[3] += sums[j + 3];
        } else {
          const float4 part = *reinterpret_cast<const float4*>(slot(from, lane) + j * 128);
          total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
        }
      }
      sums[j] = total[0], sums[j + 1] = total[1], sums[j + 2] = total[2], sums[j + 3] = total[3];
    }
    warp_sync();
    if (lane < kSplit && lane != rank_) mbarrier_arrive_at(&c.part_empty[warp_], lane);
  }

  const HopperRowsShared<Tile>& shared_;
  int warp_, rank_;
  unsigned phase_ = 0;  // of the warp's barriers
};

}  // namespace tdc
