// Torch's side of image scaling: checks, dispatch on the dtypes, the current stream, registration.
#include <tuple>

#include "../scale_images.h"
#include "scale_images_kernels.cuh"
#include "torch_side.h"

namespace lpips_fast::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Scales the batches one behind the other into `out`. `flags` has a word an image, 0 before, or is
// null.
void scale_into(const Tensor& out, const TensorList& images, const Tensor& shift,
                const Tensor& scale, bool unit_range, uint32_t* flags) {
  const int32_t device = images[0].get_device_index();
  int64_t done = 0, images_done = 0;
  for (const Tensor& image : images) {
    const ScalarType accumulator = accumulator_dtype(image.scalar_type());
    const Tensor shifts = dense(shift, MemoryFormat::Contiguous, accumulator);
    const Tensor scales = dense(scale, MemoryFormat::Contiguous, accumulator);
    const ImageBatch batch{image.const_data_ptr(), image.size(0),   image.size(2),
                           image.size(3),          image.stride(0), image.stride(1),
                           image.stride(2),        image.stride(3)};
    dispatch_feature_dtype(out.scalar_type(), [&](auto result) {
      using Out = decltype(result);
      dispatch_feature_dtype(image.scalar_type(), [&](auto element) {
        using In = decltype(element);
        using A = accumulator_t<In>;
        launch_scale_images<In>(batch, static_cast<const A*>(shifts.const_data_ptr()),
                                static_cast<const A*>(scales.const_data_ptr()), unit_range,
                                static_cast<Out*>(out.mutable_data_ptr()) + done,
                                flags ? flags + images_done : nullptr, current_stream(device));
      });
    });
    done += image.numel();
    images_done += image.size(0);
    check(cudaGetLastError());
  }
}

Tensor scale_images_cuda(TensorList images, Tensor shift, Tensor scale, bool unit_range,
                         ScalarType dtype) {
  check_scaling(Backend::kCUDA, images, shift, scale, dtype);
  const DeviceGuard guard(images[0].get_device_index());
  const Tensor out = empty_scaled_batch(images, dtype);
  if (out.numel() > 0) scale_into(out, images, shift, scale, unit_range, nullptr);
  return out;
}

// The batch, and for each of its images 0, or NaN where it holds what is not finite.
std::tuple<Tensor, Tensor> scale_images_flagged(TensorList images, Tensor shift, Tensor scale,
                                                bool unit_range, ScalarType dtype) {
  check_scaling(Backend::kCUDA, images, shift, scale, dtype);
  const int32_t device = images[0].get_device_index();
  const DeviceGuard guard(device);
  Tensor out = empty_scaled_batch(images, dtype);
  Tensor flags = empty({out.size(0)}, ScalarType::Float, images[0].device());
  if (flags.numel() == 0) return {out, flags};
  auto* words = static_cast<uint32_t*>(flags.mutable_data_ptr());
  check(cudaMemsetAsync(words, 0, static_cast<size_t>(flags.numel()) * sizeof(*words),
                        current_stream(device)));
  if (out.numel() > 0) scale_into(out, images, shift, scale, unit_range, words);
  return {out, flags};
}

}  // namespace
}  // namespace lpips_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CUDA, m) {
  m.impl("scale_images", TORCH_BOX(&lpips_fast::cuda::scale_images_cuda));
  m.impl("scale_images_flagged", TORCH_BOX(&lpips_fast::cuda::scale_images_flagged));
}
