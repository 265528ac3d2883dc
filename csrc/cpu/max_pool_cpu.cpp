// Torch's side of the CPU max-pooling: checks, work division, registration.
#include <algorithm>

#include "../stable_abi.h"
#include "channels_last_tensors.h"
#include "dispatch.h"
#include "max_pool_kernels.h"

namespace lpips_fast {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kElementsPerTask = 16 * 1024;
constexpr int64_t kChannelsPerTask = 64;  // whole cache lines, so that threads do not share one

Tensor channels_last(const Tensor& x) {
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

// 0 where no window fits, as torch has it.
int64_t output_size(int64_t size, int64_t kernel, int64_t stride, bool ceil_mode) {
  const int64_t room = size - kernel + (ceil_mode ? stride - 1 : 0);
  if (room < 0) return 0;
  const int64_t out = room / stride + 1;
  // A window may hang over the edge, but not start beyond it.
  return ceil_mode && (out - 1) * stride >= size ? out - 1 : out;
}

void check(const Tensor& x, int64_t kernel, int64_t stride) {
  STD_TORCH_CHECK(x.dim() == 4 && is_feature_dtype(x.scalar_type()),
                  "max_pool2d takes (N, C, H, W) of float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(kernel > 0 && stride > 0, "kernel and stride must be positive");
}

PoolShape shape_of_pool(const Tensor& x, const Tensor& y, int64_t kernel, int64_t stride) {
  return {x.size(1), x.size(2), x.size(3), y.size(2), y.size(3), kernel, stride};
}

Tensor max_pool2d(Tensor x, int64_t kernel, int64_t stride, bool ceil_mode) {
  check(x, kernel, stride);
  const int64_t height = output_size(x.size(2), kernel, stride, ceil_mode);
  const int64_t width = output_size(x.size(3), kernel, stride, ceil_mode);
  STD_TORCH_CHECK(height > 0 && width > 0, "an image of ", x.size(2), "x", x.size(3),
                  " is smaller than the pooling window of ", kernel, "x", kernel);
  x = channels_last(x);
  const Tensor y = empty_images(x.size(0), x.size(1), height, width, x.scalar_type());
  const PoolShape shape = shape_of_pool(x, y, kernel, stride);
  const int64_t row_elements = shape.out_width * shape.channels * kernel * kernel;
  dispatch_feature_dtype(x.scalar_type(), [&](auto feature) {
    using feature_t = decltype(feature);
    const auto* from = static_cast<const feature_t*>(x.const_data_ptr());
    auto* to = static_cast<feature_t*>(y.mutable_data_ptr());
    parallel_for(0, x.size(0) * shape.out_height,
                 std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, row_elements)),
                 [&](int64_t first, int64_t last) {
                   for (int64_t row = first; row < last; ++row) {
                     const int64_t image = row / shape.out_height;
                     max_pool_row(from + image * shape.channels * shape.height * shape.width,
                                  to + image * shape.channels * shape.out_height * shape.out_width,
                                  shape, row % shape.out_height);
                   }
                 });
  });
  return y;
}

Tensor max_pool2d_backward(Tensor grad, Tensor x, Tensor y, int64_t kernel, int64_t stride) {
  check(x, kernel, stride);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
                      grad.size(2) == y.size(2) && grad.size(3) == y.size(3) &&
                      y.size(0) == x.size(0) && y.size(1) == x.size(1) &&
                      grad.scalar_type() == x.scalar_type() && y.scalar_type() == x.scalar_type(),
                  "gradient, image and pooled image do not belong together");
  grad = channels_last(grad);
  x = channels_last(x);
  y = channels_last(y);
  const Tensor grad_x = empty_images(x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type());
  const PoolShape shape = shape_of_pool(x, y, kernel, stride);
  const int64_t groups = (shape.channels + kChannelsPerTask - 1) / kChannelsPerTask;
  dispatch_feature_dtype(x.scalar_type(), [&](auto feature) {
    using feature_t = decltype(feature);
    // Windows overlap, so threads share out images and channels, never positions.
    parallel_for(0, x.size(0) * groups, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t image = task / groups, begin = task % groups * kChannelsPerTask;
        const int64_t in = image * shape.channels * shape.height * shape.width;
        const int64_t out = image * shape.channels * shape.out_height * shape.out_width;
        max_pool_backward(static_cast<const feature_t*>(grad.const_data_ptr()) + out,
                          static_cast<const feature_t*>(x.const_data_ptr()) + in,
                          static_cast<const feature_t*>(y.const_data_ptr()) + out,
                          static_cast<feature_t*>(grad_x.mutable_data_ptr()) + in, shape, begin,
                          std::min(begin + kChannelsPerTask, shape.channels));
      }
    });
  });
  return grad_x;
}

}  // namespace
}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&lpips_fast::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&lpips_fast::max_pool2d_backward));
}
