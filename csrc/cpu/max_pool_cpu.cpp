// Torch's side of the CPU max-pooling: checks, work division, registration.
#include <algorithm>
#include <optional>

#include "../max_pool.h"
#include "dispatch.h"
#include "max_pool_kernels.h"
#include "parallel.h"

namespace lpips_fast {
namespace {

constexpr int64_t kElementsPerTask = 16 * 1024;
constexpr int64_t kTasks = 16, kRowsPerTask = 16;  // of a gradient: few images are cut into rows

Tensor max_pool2d(Tensor x, int64_t kernel, int64_t stride, bool ceil_mode) {
  check_pool(Backend::kCPU, x, kernel, stride);
  const Tensor y = empty_pooled(x, kernel, stride, ceil_mode);
  if (y.numel() == 0) return y;
  x = channels_last(x);
  const PoolShape shape = shape_of_pool(x, y, kernel, stride);
  const int64_t row_elements = product({shape.out_width, shape.channels, kernel, kernel});
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

void check_keys(const Tensor& keys, const Tensor& x) {
  Operands(Backend::kCPU).check("keys", keys);
  const bool fit = keys.dim() == 4 && keys.scalar_type() == ScalarType::Long &&
                   keys.is_contiguous() && keys.size(0) == x.size(0) && keys.size(1) > 0 &&
                   x.size(1) % keys.size(1) == 0 && keys.size(2) == x.size(2) &&
                   keys.size(3) == x.size(3);
  LPIPS_FAST_CHECK(fit, "max_pool2d_backward takes contiguous int64 keys (N, groups, H, W) of its ",
                   "images, got ", description_of(keys), " for ", description_of(x));
}

Tensor max_pool2d_backward(Tensor grad, Tensor x, Tensor y, int64_t kernel, int64_t stride,
                           std::optional<Tensor> keys) {
  check_pool(Backend::kCPU, x, kernel, stride);
  check_pool_gradient(Backend::kCPU, grad, x, y, kernel, stride);
  if (keys) check_keys(*keys, x);
  const Tensor grad_x = empty_channels_last(x, x.size(2), x.size(3));
  if (grad_x.numel() == 0) return grad_x;
  grad = channels_last(grad);
  x = channels_last(x);
  y = channels_last(y);
  const PoolShape shape = shape_of_pool(x, y, kernel, stride);
  const int64_t in = shape.channels * shape.height * shape.width;
  const int64_t out = shape.channels * shape.out_height * shape.out_width;
  const int64_t groups = keys ? keys->size(1) : 1;
  const auto* all_keys = keys ? static_cast<const int64_t*>(keys->const_data_ptr()) : nullptr;
  const int64_t cuts = (kTasks + x.size(0) - 1) / x.size(0);
  const int64_t rows = std::max(kRowsPerTask, (shape.height + cuts - 1) / cuts);
  const int64_t tasks = (shape.height + rows - 1) / rows;
  dispatch_feature_dtype(x.scalar_type(), [&](auto feature) {
    using feature_t = decltype(feature);
    parallel_for(0, x.size(0) * tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t image = task / tasks, top = task % tasks * rows;
        max_pool_backward(static_cast<const feature_t*>(grad.const_data_ptr()) + image * out,
                          static_cast<const feature_t*>(x.const_data_ptr()) + image * in,
                          static_cast<const feature_t*>(y.const_data_ptr()) + image * out,
                          keys ? all_keys + image * groups * shape.height * shape.width : nullptr,
                          groups, static_cast<feature_t*>(grad_x.mutable_data_ptr()) + image * in,
                          shape, top, std::min(top + rows, shape.height));
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
