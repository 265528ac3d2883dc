// Torch's side of image scaling: checks, dispatch on the dtypes, the current stream, registration.
#include <tuple>

#include "../lpips_distance.h"
#include "../scale_images.h"
#include "scale_images_kernels.cuh"
#include "torch_side.h"

namespace lpips_fast::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// shift or scale as the kernel reads it, without a copy where it already is of that dtype.
Tensor in_accumulator_dtype(const Tensor& t, ScalarType dtype) {
  return torch::stable::contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

// `flags` is (sum of N_k,), 0 before, or undefined.
Tensor scale(const TensorList& images, const Tensor& shift, const Tensor& scale, bool unit_range,
             ScalarType dtype, uint32_t* flags) {
  const int32_t device = images[0].get_device_index();
  const Tensor out = empty_scaled_batch(images, dtype);
  int64_t done = 0, images_done = 0;
  for (const Tensor& image : images) {
    const ScalarType accumulator = accumulator_dtype(image.scalar_type());
    const Tensor shifts = in_accumulator_dtype(shift, accumulator);
    const Tensor scales = in_accumulator_dtype(scale, accumulator);
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
                                flags ? flags + images_done : nullptr, current_stream(device));
      });
    });
    done += image.numel();
    images_done += image.size(0);
    check(cudaGetLastError());
  }
  return out;
}

void check_all(const TensorList& images, const Tensor& shift, const Tensor& scale,
               ScalarType dtype) {
  check_images(images, shift, scale, dtype);
  for (const Tensor& image : images)
    STD_TORCH_CHECK(same_device(image, images[0]) && same_device(shift, images[0]) &&
                        same_device(scale, images[0]),
                    "images, shift and scale must be on one device");
}

Tensor scale_images_cuda(TensorList images, Tensor shift, Tensor scale_of, bool unit_range,
                         ScalarType dtype) {
  check_all(images, shift, scale_of, dtype);
  const DeviceGuard guard(images[0].get_device_index());
  return scale(images, shift, scale_of, unit_range, dtype, nullptr);
}

// The batch, and for each of its images 0, or NaN where it holds what is not finite.
std::tuple<Tensor, Tensor> scale_images_flagged(TensorList images, Tensor shift, Tensor scale_of,
                                                bool unit_range, ScalarType dtype) {
  check_all(images, shift, scale_of, dtype);
  const int32_t device = images[0].get_device_index();
  const DeviceGuard guard(device);
  int64_t count = 0;
  for (const Tensor& image : images) count += image.size(0);
  const Tensor flags =
      torch::stable::empty({count}, ScalarType::Float, std::nullopt, images[0].device());
  check(cudaMemsetAsync(flags.mutable_data_ptr(), 0, static_cast<size_t>(count) * sizeof(float),
                        current_stream(device)));
  Tensor out = scale(images, shift, scale_of, unit_range, dtype,
                     static_cast<uint32_t*>(flags.mutable_data_ptr()));
  return {out, flags};
}

}  // namespace
}  // namespace lpips_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CUDA, m) {
  m.impl("scale_images", TORCH_BOX(&lpips_fast::cuda::scale_images_cuda));
  m.impl("scale_images_flagged", TORCH_BOX(&lpips_fast::cuda::scale_images_flagged));
}
