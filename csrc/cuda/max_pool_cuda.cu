// Torch's side of max-pooling: checks, dispatch on the dtype, the current stream, registration.
#include <optional>

#include "../max_pool.h"
#include "max_pool_kernels.cuh"
#include "torch_side.h"

namespace lpips_fast::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor max_pool2d(Tensor x, int64_t kernel, int64_t stride, bool ceil_mode) {
  check_pool(Backend::kCUDA, x, kernel, stride);
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const Tensor y = empty_pooled(x, kernel, stride, ceil_mode);
  if (y.numel() == 0) return y;
  x = channels_last(x);
  dispatch_feature_dtype(x.scalar_type(), [&](auto feature) {
    using T = decltype(feature);
    launch_max_pool(static_cast<const T*>(x.const_data_ptr()),
                    static_cast<T*>(y.mutable_data_ptr()), x.size(0),
                    shape_of_pool(x, y, kernel, stride), current_stream(device));
  });
  check(cudaGetLastError());
  return y;
}

Tensor max_pool2d_backward(Tensor grad, Tensor x, Tensor y, int64_t kernel, int64_t stride,
                           std::optional<Tensor> keys) {
  check_pool(Backend::kCUDA, x, kernel, stride);
  LPIPS_FAST_CHECK(!keys, "max_pool2d_backward on CUDA takes no keys");
  check_pool_gradient(Backend::kCUDA, grad, x, y, kernel, stride);
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const Tensor grad_x = empty_channels_last(x, x.size(2), x.size(3));
  if (grad_x.numel() == 0) return grad_x;
  grad = channels_last(grad);
  x = channels_last(x);
  y = channels_last(y);
  dispatch_feature_dtype(x.scalar_type(), [&](auto feature) {
    using T = decltype(feature);
    launch_max_pool_backward(
        static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
        static_cast<const T*>(y.const_data_ptr()), static_cast<T*>(grad_x.mutable_data_ptr()),
        x.size(0), shape_of_pool(x, y, kernel, stride), current_stream(device));
  });
  check(cudaGetLastError());
  return grad_x;
}

}  // namespace
}  // namespace lpips_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CUDA, m) {
  m.impl("max_pool2d", TORCH_BOX(&lpips_fast::cuda::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&lpips_fast::cuda::max_pool2d_backward));
}
