// What scale_images accepts and returns, for its CPU and CUDA implementations.
//
//   scale_images(images, shift, scale, unit_range, dtype) -> (sum of N_k, 3, H, W)
//
// images[k] is (N_k, 3, H, W) of any strides and floating dtype; shift and scale have 3 elements.
// The result is (2 x - 1 - shift) / scale, without the 2 x - 1 unless unit_range: channels-last, in
// `dtype`, computed in float32 (float64 for float64 images) by these operations in this order.
#pragma once

#include "allocation.h"
#include "checks.h"

namespace lpips_fast {

constexpr int64_t kImageChannels = 3;

inline void check_scaling(Backend backend, const TensorList& images, const Tensor& shift,
                          const Tensor& scale, ScalarType dtype) {
  LPIPS_FAST_CHECK(!images.empty(), "expected at least one batch of images");
  Operands(backend).check("images", images).check("shift", shift).check("scale", scale);
  LPIPS_FAST_CHECK(shift.numel() == kImageChannels && scale.numel() == kImageChannels &&
                       is_feature_dtype(shift.scalar_type()) &&
                       is_feature_dtype(scale.scalar_type()),
                   "expected a floating shift and scale for each of 3 channels, got ",
                   description_of(shift), " and ", description_of(scale));
  LPIPS_FAST_CHECK(is_feature_dtype(dtype),
                   "the result must be float32, float64, float16 or bfloat16, got ",
                   torch::headeronly::toString(dtype));
  for (const Tensor& image : images) {
    check_images("scale_images", image);
    LPIPS_FAST_CHECK(
        has_shape(image, {image.size(0), kImageChannels, images[0].size(2), images[0].size(3)}),
        "expected batches of images (N, 3, H, W) of one size, got ", shape_of(image), " beside ",
        shape_of(images[0]));
  }
}

inline Tensor empty_scaled_batch(const TensorList& images, ScalarType dtype) {
  int64_t batch = 0;
  for (const Tensor& image : images) batch = sum(batch, image.size(0));
  return empty({batch, kImageChannels, images[0].size(2), images[0].size(3)}, dtype,
               images[0].device(), MemoryFormat::ChannelsLast);
}

}  // namespace lpips_fast
