// The main loop of all convolution kernels: a pipeline of stages from device memory to mma.sync.
//
//   stage     0       1       2       3       0       1        A loader fills a stage with cp.async, the warps multiply
//   copy    |step 0 |step 1 |step 2 |step 3 |step 4 |step 5    out of the oldest one. One barrier per step: after it
//   multiply                        |step 0 |step 1 |step 2    all threads see the copies of that step, and no thread
//                                                              reads the stage that the next copies overwrite.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/operand.cuh"

namespace tdc {

// The product of two operands: sums[row, column] += sum over depth of a[row, depth] b[column, depth].
template <class T, class TileShape, template <class, int> class OperandA, template <class, int> class OperandB>
struct ConvProduct {
  using Element = T;
  using Tile = TileShape;
  using A = OperandA<T, Tile::kRows>;
  using B = OperandB<T, Tile::kColumns>;
  static constexpr int kThreads = Tile::kThreads, kWarps = kThreads / 32;
  using ShareA = CopyShare<A, kThreads>;
  using ShareB = CopyShare<B, kThreads>;
  static constexpr int kWarpRows = Tile::kWarpRows, kWarpColumns = 32;
  static constexpr int kWarpsAcross = Tile::kColumns / kWarpColumns;
  static constexpr int kRowFragments = kWarpRows / 16, kColumnFragments = kWarpColumns / 8;
  static constexpr int kSteps = kConvDepth / (kChunksPerStep * kPerChunk<T>);  // mma steps in a stage
  static constexpr int kStages = conv_stages(sizeof(T)), kStageBytes = A::kBytes + B::kBytes;
  static_assert(kWarps * kWarpRows * kWarpColumns == Tile::kRows * Tile::kColumns, "the warps cover the tile");
  static_assert(kStages * kStageBytes == conv_shared_bytes<Tile>(sizeof(T)), "the host asks for what is used");

  // The sums of one warp, as mma leaves them: element e of a fragment is at row lane / 4 + e / 2 * 8, column
  // lane % 4 * 2 + e % 2.
  using Sums = float[kRowFragments][kColumnFragments][4];

  // Where a warp's part of the tile begins.
  static __device__ __forceinline__ constexpr int row_of(int warp) { return warp / kWarpsAcross * kWarpRows; }
  static __device__ __forceinline__ constexpr int column_of(int warp) {
    return (warp + warp / kWarpsAcross * 2) % kWarpsAcross * kWarpColumns;
  }
  static __device__ __forceinline__ int warp_row() { return row_of(threadIdx.x / 32); }
  static __device__ __forceinline__ int warp_column() { return column_of(threadIdx.x / 32); }
};

// Warp w runs on sub-partition w % 4 of its SM. Whether all four have work when only half of the tile is live.
template <class P>
__device__ constexpr bool halves_spread() {
  unsigned top = 0, left = 0;  // sub-partitions
  for (int warp = 0; warp < P::kWarps; ++warp) {
    if (P::row_of(warp) < P::Tile::kRows / 2) top |= 1u << warp % 4;
    if (P::column_of(warp) < P::Tile::kColumns / 2) left |= 1u << warp % 4;
  }
  return top == 0xfu && left == 0xfu;
}
static_assert(halves_spread<ConvProduct<bf16, Tile128, DepthInner, DepthInner>>(), "sub-partitions of an SM");

__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], float) {
  mma_16x8x8_tf32(d, a, b);
}
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], T type) {
  mma_16x8x16(d, a, b, type);
}

template <class P>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, typename P::Sums& sums) {
  const int lane = threadIdx.x % 32, first_row = P::warp_row(), first_column = P::warp_column();
#pragma unroll
  for (int step = 0; step < P::kSteps; ++step) {
    unsigned a[P::kRowFragments][4], b[P::kColumnFragments][2];
#pragma unroll
    for (int i = 0; i < P::kRowFragments; ++i) P::A::load(a[i], stage, first_row + i * 16, step, lane);
#pragma unroll
    for (int j = 0; j < P::kColumnFragments; j += 2) {
      unsigned pair[4];
      P::B::load(pair, stage + P::A::kBytes, first_column + j * 8, step, lane);
      b[j][0] = pair[0], b[j][1] = pair[2];
      b[j + 1][0] = pair[1], b[j + 1][1] = pair[3];
    }
#pragma unroll
    for (int i = 0; i < P::kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < P::kColumnFragments; ++j) multiply(sums[i][j], a[i], b[j], typename P::Element());
    }
  }
}

// Runs `steps` steps of a loader, whose load(stage) copies both operands of the next step. A warp multiplies where its
// part of the tile is `live`. On return all threads have finished with shared memory.
template <class P, class Loader>
__device__ __forceinline__ void run_pipeline(Loader& loader, int steps, bool live, unsigned char* stages,
                                             typename P::Sums& sums) {
#pragma unroll
  for (int stage = 0; stage < P::kStages - 1; ++stage) {
    if (stage < steps) loader.load(stages + stage * P::kStageBytes);
    cp_async_commit();
  }
  int oldest = 0, next = P::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    if (!TDC_PLANTED(CONV_NO_WAIT)) cp_async_wait<P::kStages - 2>();
    if (!TDC_PLANTED(CONV_NO_BARRIER)) block_sync();
    if (step + P::kStages - 1 < steps) loader.load(stages + next * P::kStageBytes);
    cp_async_commit();
    if (live) multiply_stage<P>(stages + (TDC_PLANTED(CONV_WRONG_STAGE) ? next : oldest) * P::kStageBytes, sums);
    oldest = oldest + 1 == P::kStages ? 0 : oldest + 1;
    next = next + 1 == P::kStages ? 0 : next + 1;
  }
  cp_async_wait<0>();
  block_sync();
}

}  // namespace tdc
