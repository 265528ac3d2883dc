// Sums over lanes and warps, in an order that depends on nothing but the launch's shape.
#pragma once

#include "launch_plan.h"

namespace lpips_fast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over each group of `lanes` neighbouring lanes (a power of two); all of them receive it, with
// the same bits. Every lane of the warp must take part.
template <typename A>
__device__ __forceinline__ A group_sum(A value, int lanes) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    if (lanes > offset) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// group_sum of a number of each feature, split: even lanes receive feat0's sum, odd lanes feat1's.
// It halves the shuffles, and the square roots and divisions that follow. `lanes` is at least 2.
template <typename A>
__device__ __forceinline__ A split_group_sum(A value0, A value1, int lanes) {
  const bool odd = threadIdx.x % 2 != 0;
  A value = (odd ? value1 : value0) + __shfl_xor_sync(kAllLanes, odd ? value0 : value1, 1);
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 1; offset /= 2)
    if (lanes > offset) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Both features' numbers in every lane, out of what even and odd lanes hold.
template <typename A>
struct Pair {
  A feat0, feat1;

  __device__ __forceinline__ explicit Pair(A split) {
    const bool odd = threadIdx.x % 2 != 0;
    const A other = __shfl_xor_sync(kAllLanes, split, 1);
    feat0 = odd ? other : split;
    feat1 = odd ? split : other;
  }
};

// Sum over lanes of equal rank in their groups of `lanes`.
template <typename A>
__device__ __forceinline__ A sum_across_groups(A value, int lanes) {
  for (int offset = lanes; offset < kWarpSize; offset *= 2)
    value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Sum over the block, received by thread 0. Every thread must take part, once a launch.
template <typename A>
__device__ __forceinline__ A block_sum(A value) {
  __shared__ A warp_sums[kChannelsFirstMaxThreads / kWarpSize];
  value = group_sum(value, kWarpSize);
  if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  A sum = 0;
  if (threadIdx.x == 0)
    for (unsigned w = 0; w < blockDim.x / kWarpSize; ++w) sum += warp_sums[w];
  return sum;
}

}  // namespace lpips_fast::cuda
