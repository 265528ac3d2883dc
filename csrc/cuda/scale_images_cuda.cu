// Torch's side of image scaling: checks, dispatch on the dtypes, the current stream, registration.
#include "../scale_images.h"
#include "scale_images_kernels.cuh"
#include "torch_side.h"

namespace lpips_fast::cuda {
namespace {

Tensor scale_images_cuda(TensorList images, Tensor shift, Tensor scale, bool unit_range,
                         ScalarType dtype) {
  check_scaling(Backend::kCUDA, images, shift, scale, dtype);
  const int32_t device = images[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor out = empty_scaled_batch(images, dtype);
  if (out.numel() == 0) return out;
  int64_t done = 0;
  for (const Tensor& image : images) {
    const ScalarType accumulator = accumulator_dtype(image.scalar_type());
    const Tensor shifts = dense(shift, MemoryFormat::Contiguous, accumulator);
    const Tensor scales = dense(scale, MemoryFormat::Contiguous, accumulator);
    const ImageBatch batch{image.const_data_ptr(), image.size(0),   image.size(2),
                           image.size(3),          image.stride(0), image.stride(1),
                           image.stride(2),        image.stride(3)};
    dispatch_feature_dtype(dtype, [&](auto result) {
      using Out = decltype(result);
      dispatch_feature_dtype(image.scalar_type(), [&](auto element) {
        using In = decltype(element);
        using A = accumulator_t<In>;
        launch_scale_images<In>(batch, static_cast<const A*>(shifts.const_data_ptr()),
                                static_cast<const A*>(scales.const_data_ptr()), unit_range,
                                static_cast<Out*>(out.mutable_data_ptr()) + done,
                                current_stream(device));
      });
    });
    done += image.numel();
    check(cudaGetLastError());
  }
  return out;
}

}  // namespace
}  // namespace lpips_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CUDA, m) {
  m.impl("scale_images", TORCH_BOX(&lpips_fast::cuda::scale_images_cuda));
}
