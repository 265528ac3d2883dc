// Torch's side of bias and ReLU in place: checks, the current stream, registration.
#include "../bias_relu.h"
#include "bias_relu_kernels.cuh"
#include "torch_side.h"

namespace lpips_fast::cuda {
namespace {

void bias_relu_(Tensor y, Tensor bias) {
  check_bias_relu(Backend::kCUDA, y, bias);
  if (y.numel() == 0) return;
  const int32_t device = y.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  bias = dense(bias);
  dispatch_feature_dtype(y.scalar_type(), [&](auto feature) {
    using T = decltype(feature);
    launch_bias_relu(static_cast<T*>(y.mutable_data_ptr()),
                     static_cast<const T*>(bias.const_data_ptr()),
                     y.size(0) * y.size(2) * y.size(3), y.size(1), current_stream(device));
  });
  check(cudaGetLastError());
}

}  // namespace
}  // namespace lpips_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CUDA, m) {
  m.impl("bias_relu_", TORCH_BOX(&lpips_fast::cuda::bias_relu_));
}
