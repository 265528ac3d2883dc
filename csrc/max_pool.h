// What max-pooling accepts and returns, for its CPU and CUDA implementations.
//
//   max_pool2d(x, kernel, stride, ceil_mode) -> y
//   max_pool2d_backward(grad, x, y, kernel, stride, keys) -> the gradient to x
//
// Channels-last images without an index tensor: torch's own writes 8 bytes of index per output. NaN
// is larger than anything. The backward finds the maximum again by comparing the window with the
// pooled value: among equal values the first of the window, row by row, gets the gradient, as in
// torch, and so does the first NaN.
//
// Keys (N, groups, H, W), int64, say which positions are equal but for rounding in a group of
// channels, by whatever way they were computed (csrc/cpu/receptive_fields_cpu.cpp): a window's
// gradient then goes to the first position with the maximum's key. The CPU alone takes them.
#pragma once

#include "allocation.h"
#include "checks.h"
#include "pool_shape.h"

namespace lpips_fast {

inline Tensor channels_last(const Tensor& x) { return dense(x, MemoryFormat::ChannelsLast); }

inline Tensor empty_channels_last(const Tensor& like, int64_t height, int64_t width) {
  return empty({like.size(0), like.size(1), height, width}, like.scalar_type(), like.device(),
               MemoryFormat::ChannelsLast);
}

inline void check_pool(Backend backend, const Tensor& x, int64_t kernel, int64_t stride) {
  Operands(backend).check("x", x);
  check_images("max_pool2d", x);
  check_parameter("kernel", kernel, 1);
  check_parameter("stride", stride, 1);
  LPIPS_FAST_CHECK(x.size(1) > 0, "max_pool2d takes at least one channel, got ", shape_of(x));
}

// The result of pooling `x`, still to be written.
inline Tensor empty_pooled(const Tensor& x, int64_t kernel, int64_t stride, bool ceil_mode) {
  const int64_t height = pooled_size(x.size(2), kernel, stride, ceil_mode);
  const int64_t width = pooled_size(x.size(3), kernel, stride, ceil_mode);
  LPIPS_FAST_CHECK(height > 0 && width > 0, "an image of ", x.size(2), "x", x.size(3),
                   " is smaller than the pooling window of ", kernel, "x", kernel);
  return empty_channels_last(x, height, width);
}

inline void check_pool_gradient(Backend backend, const Tensor& grad, const Tensor& x,
                                const Tensor& y, int64_t kernel, int64_t stride) {
  Operands(backend).check("x", x).check("gradient", grad).check("pooled image", y);
  const auto pooled = [&](bool ceil_mode) {
    const int64_t height = pooled_size(x.size(2), kernel, stride, ceil_mode);
    const int64_t width = pooled_size(x.size(3), kernel, stride, ceil_mode);
    return height > 0 && width > 0 && has_shape(y, {x.size(0), x.size(1), height, width});
  };
  LPIPS_FAST_CHECK((pooled(false) || pooled(true)) && same_shape(grad, y) &&
                       grad.scalar_type() == x.scalar_type() && y.scalar_type() == x.scalar_type(),
                   "gradient, image and pooled image do not belong together: ",
                   description_of(grad), ", ", description_of(x), " and ", description_of(y),
                   " for windows of ", kernel, "x", kernel, " with a stride of ", stride);
}

inline PoolShape shape_of_pool(const Tensor& x, const Tensor& y, int64_t kernel, int64_t stride) {
  return {x.size(1), x.size(2), x.size(3), y.size(2), y.size(3), kernel, stride};
}

}  // namespace lpips_fast
