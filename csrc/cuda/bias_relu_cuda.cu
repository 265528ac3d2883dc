// Torch's side of bias and ReLU in place: checks, the current stream, registration.
#include "../lpips_distance.h"
#include "bias_relu_kernels.cuh"
#include "torch_side.h"

namespace lpips_fast::cuda {
namespace {

bool is_dense_channels_last(const Tensor& t) {
  int64_t stride = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

void bias_relu_(Tensor y, Tensor bias) {
  const ScalarType dtype = y.scalar_type();
  STD_TORCH_CHECK(y.dim() == 4 && (dtype == ScalarType::Float || dtype == ScalarType::Double ||
                                   dtype == ScalarType::Half || dtype == ScalarType::BFloat16),
                  "bias_relu_ takes (N, C, H, W) of float32, float64, float16 or bfloat16, got ",
                  shape_of(y), " ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(y.numel() == 0 || is_dense_channels_last(y),
                  "bias_relu_ writes in place and takes dense channels-last memory alone; call "
                  ".contiguous(memory_format=torch.channels_last) first");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == y.size(1) && bias.scalar_type() == dtype &&
                      same_device(bias, y),
                  "the bias must be (", y.size(1),
                  ",), one per channel, in the dtype and on the "
                  "device of the images, got ",
                  shape_of(bias), " ", torch::headeronly::toString(bias.scalar_type()));
  const int32_t device = y.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  bias = torch::stable::contiguous(bias);
  dispatch_feature_dtype(dtype, [&](auto feature) {
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
