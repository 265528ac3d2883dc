// The second stage of every reduction: partial sums of blocks, added in a fixed order.
#pragma once

#include "vector_load.cuh"
#include "warp_reduce.cuh"

namespace lpips_fast::cuda {

constexpr int kMeanThreads = 128;

// out[n, column] = mean over the positions of layer and image: one block for each. A layer without
// positions has the mean 0/0 = NaN, as torch.mean has it.
template <typename A>
__global__ void __launch_bounds__(kMeanThreads)
    mean_of_partial_sums(const __grid_constant__ MeanTasks tasks) {
  const uint32_t image = blockIdx.x / tasks.layer_count;
  const MeanTask& task = tasks.layers[blockIdx.x % tasks.layer_count];
  const A* sums = static_cast<const A*>(tasks.sums) + task.sums_first + int64_t{image} * task.tiles;
  A sum = 0;
  for (uint32_t tile = threadIdx.x; tile < task.tiles; tile += kMeanThreads) sum += sums[tile];
  sum = block_sum(sum);
  if (threadIdx.x == 0)
    static_cast<A*>(tasks.out)[int64_t{image} * tasks.columns + task.column] =
        sum / static_cast<A>(task.divisor);
}

// The weight's gradient: a block adds the rows of 32 channels, 16 rows at a time.
template <typename A>
__global__ void __launch_bounds__(kWeightSumChannels* kWeightSumRows)
    sum_of_weight_rows(const __grid_constant__ WeightTasks tasks) {
  __shared__ A sums[kWeightSumRows][kWeightSumChannels];
  int index = 0;
  for (int l = 1; l < tasks.layer_count; ++l)
    if (blockIdx.x >= tasks.layers[l].first_block) index = l;
  const WeightTask& task = tasks.layers[index];
  const int column = threadIdx.x % kWeightSumChannels, line = threadIdx.x / kWeightSumChannels;
  const int channel = (blockIdx.x - task.first_block) * kWeightSumChannels + column;
  const A* rows = static_cast<const A*>(tasks.workspace) + task.rows_first;
  A sum = 0;
  if (channel < task.channels)
    for (int64_t row = line; row < task.rows; row += kWeightSumRows)
      sum += rows[row * task.channels + channel];
  sums[line][column] = sum;
  __syncthreads();
  if (line == 0 && channel < task.channels) {
    for (int l = 1; l < kWeightSumRows; ++l) sum += sums[l][column];
    static_cast<A*>(task.out)[channel] = sum;
  }
}

}  // namespace lpips_fast::cuda
