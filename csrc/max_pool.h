// What max-pooling accepts and returns, for its CPU and CUDA implementations.
//
//   max_pool2d(x, kernel, stride, ceil_mode, keys) -> y
//   max_pool2d_backward(grad, x, y, kernel, stride, keys) -> the gradient to x
//
// Channels-last images without an index tensor: torch's own writes 8 bytes of index per output. NaN
// is larger than anything. The backward finds the maximum again by comparing the window with the
// pooled value: among equal values the first of the window, row by row, gets the gradient, as in
// torch, and so does the first NaN.
//
// Keys (N, groups, H, W), int64, say which positions are equal but for rounding in a group of
// channels, by whatever way they were computed (csrc/cpu/receptive_fields_cpu.cpp): a window's
// gradient then goes to the first position with the maximum's key. They decide nothing in the
// forward.
#pragma once

#include "feature_dtype.h"
#include "pool_shape.h"
#include "stable_abi.h"

namespace lpips_fast {

inline torch::stable::Tensor channels_last(const torch::stable::Tensor& x) {
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline torch::stable::Tensor empty_channels_last(const torch::stable::Tensor& like, int64_t height,
                                                 int64_t width) {
  return torch::stable::empty({like.size(0), like.size(1), height, width}, like.scalar_type(),
                              std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

inline void check_pool(const torch::stable::Tensor& x, int64_t kernel, int64_t stride) {
  STD_TORCH_CHECK(x.dim() == 4 && is_feature_dtype(x.scalar_type()),
                  "max_pool2d takes (N, C, H, W) of float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(kernel > 0 && stride > 0, "kernel and stride must be positive");
}

// The result of pooling `x`, still to be written.
inline torch::stable::Tensor empty_pooled(const torch::stable::Tensor& x, int64_t kernel,
                                          int64_t stride, bool ceil_mode) {
  const int64_t height = pooled_size(x.size(2), kernel, stride, ceil_mode);
  const int64_t width = pooled_size(x.size(3), kernel, stride, ceil_mode);
  STD_TORCH_CHECK(height > 0 && width > 0, "an image of ", x.size(2), "x", x.size(3),
                  " is smaller than the pooling window of ", kernel, "x", kernel);
  return empty_channels_last(x, height, width);
}

inline void check_pool_gradient(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                                const torch::stable::Tensor& y) {
  STD_TORCH_CHECK(grad.dim() == 4 && y.dim() == 4 && grad.size(0) == x.size(0) &&
                      grad.size(1) == x.size(1) && grad.size(2) == y.size(2) &&
                      grad.size(3) == y.size(3) && y.size(0) == x.size(0) &&
                      y.size(1) == x.size(1) && grad.scalar_type() == x.scalar_type() &&
                      y.scalar_type() == x.scalar_type(),
                  "gradient, image and pooled image do not belong together");
}

inline PoolShape shape_of_pool(const torch::stable::Tensor& x, const torch::stable::Tensor& y,
                               int64_t kernel, int64_t stride) {
  return {x.size(1), x.size(2), x.size(3), y.size(2), y.size(3), kernel, stride};
}

}  // namespace lpips_fast
