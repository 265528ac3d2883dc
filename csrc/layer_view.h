// What a kernel sees of one layer: raw pointers and strides, no torch headers, so that the same
// description serves the CPU kernels, the CUDA kernels (nvcc) and their emulation on the host.
#pragma once

#include <cstdint>

namespace lpips_fast {

// The two memory orders that have a kernel. Strides stay free in every other dimension, so a crop,
// a slice of a batch or an expanded tensor is read where it lies.
enum class MemoryOrder : int32_t {
  kChannelsLast,   // stride_c == 1: the channel vector of a position is contiguous
  kChannelsFirst,  // stride_w == 1: neighbouring positions of a channel are contiguous
};

// A read-only (N, C, H, W) tensor. Strides are in elements.
struct FeatureView {
  const void* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// A gradient that a kernel writes; `data` is null where none was asked for.
struct GradientView {
  void* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// One layer of a distance: two features of one shape, one memory order and one dtype.
// Accumulators, weights, distances and gradients of distances are float32 for half, bfloat16 and
// float32 features, and float64 for float64 features.
struct LayerView {
  int64_t n, c, h, w;
  MemoryOrder order;
  FeatureView feat0, feat1;
  const void* weight;  // (C,), contiguous, accumulator dtype
};

}  // namespace lpips_fast
