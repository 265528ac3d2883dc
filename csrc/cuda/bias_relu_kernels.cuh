// y = relu(y + bias), in place, for a channels-last batch: what is left of a convolution where
// cuDNN does not add the bias and clip by itself. torch takes two passes for it.
//
// Memory: reads y once and writes it once; the bias stays in the L1 cache.
//
// Threads: the batch is one line of 16-byte vectors (single elements where the address or the
// number of channels does not allow them). A block of 256 threads takes 1024 neighbouring ones,
// four a thread, 256 apart, all loaded before the first is used.
//
// NaN stays NaN, as in torch's ReLU. The sum is rounded to y's dtype once, as by torch's addition.
#pragma once

#include <stdexcept>

#include "launch.cuh"
#include "launch_plan.h"
#include "vector_load.cuh"

namespace lpips_fast::cuda {

constexpr int kBiasReluThreads = 256, kBiasReluPerThread = 4;

struct BiasReluTask {
  void* y;
  const void* bias;
  int64_t vectors;      // of y
  uint32_t chunks;      // vectors that make up the channels of a position
  uint32_t chunk_step;  // kBiasReluThreads modulo chunks
};

template <typename T, int kSize>
__global__ void __launch_bounds__(kBiasReluThreads)
    bias_relu(const __grid_constant__ BiasReluTask task) {
  using A = accumulator_t<T>;
  const int64_t first = int64_t{blockIdx.x} * (kBiasReluThreads * kBiasReluPerThread) + threadIdx.x;
  if (first >= task.vectors) return;
  T* y = static_cast<T*>(task.y) + first * kSize;
  const T* bias = static_cast<const T*>(task.bias);
  // Divisions of 64 bits take several times as long.
  uint32_t chunk = task.vectors <= UINT32_MAX ? static_cast<uint32_t>(first) % task.chunks
                                              : static_cast<uint32_t>(first % task.chunks);
  const int64_t left = task.vectors - first;
  Vector<T, kSize> values[kBiasReluPerThread];
#pragma unroll
  for (int k = 0; k < kBiasReluPerThread; ++k)
    if (k * kBiasReluThreads < left) values[k].load_written(y + k * kBiasReluThreads * kSize);
#pragma unroll
  for (int k = 0; k < kBiasReluPerThread; ++k) {
    if (k * kBiasReluThreads >= left) return;
    Vector<T, kSize> addend;
    addend.load(bias, chunk);
    A sums[kSize], addends[kSize];
    values[k].unpack(sums);
    addend.unpack(addends);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sums[i] += addends[i];
      if (sums[i] <= A(0)) sums[i] = 0;  // false for NaN
    }
    Vector<T, kSize>::store(y + k * kBiasReluThreads * kSize, 0, sums);
    chunk += task.chunk_step;
    if (chunk >= task.chunks) chunk -= task.chunks;
  }
}

// `y` is (positions, channels), dense.
template <typename T, typename Stream>
void launch_bias_relu(T* y, const T* bias, int64_t positions, int64_t channels, Stream stream) {
  using planning::aligned;
  if (positions == 0 || channels == 0) return;
  if (channels > kMaxChannels)
    throw std::invalid_argument("lpips_fast: more than 2^27 channels are not supported");
  constexpr int kSize = 16 / sizeof(T);
  const bool vectors = channels % kSize == 0 && aligned(y, 16) && aligned(bias, 16);
  BiasReluTask task{};
  task.y = y;
  task.bias = bias;
  task.chunks = static_cast<uint32_t>(vectors ? channels / kSize : channels);
  task.chunk_step = kBiasReluThreads % task.chunks;
  task.vectors = positions * task.chunks;
  const int64_t blocks = planning::divide_up(task.vectors, kBiasReluThreads * kBiasReluPerThread);
  if (blocks > INT32_MAX)
    throw std::invalid_argument(
        "lpips_fast: the batch needs more than 2^31-1 blocks; split it into smaller batches");
  if (vectors) {
    LPIPS_FAST_LAUNCH((bias_relu<T, kSize>), static_cast<uint32_t>(blocks), kBiasReluThreads,
                      stream, task);
  } else {
    LPIPS_FAST_LAUNCH((bias_relu<T, 1>), static_cast<uint32_t>(blocks), kBiasReluThreads, stream,
                      task);
  }
}

}  // namespace lpips_fast::cuda
