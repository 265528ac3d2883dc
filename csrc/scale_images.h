// What scale_images accepts and returns, for its CPU and CUDA implementations.
//
//   scale_images(images, shift, scale, unit_range, dtype) -> (sum of N_k, 3, H, W)
//
// images[k] is (N_k, 3, H, W) of any strides and floating dtype; shift and scale have 3 elements.
// The result is (2 x - 1 - shift) / scale, without the 2 x - 1 unless unit_range: channels-last, in
// `dtype`, computed in float32 (float64 for float64 images) by these operations in this order.
#pragma once

#include <vector>

#include "feature_dtype.h"
#include "stable_abi.h"

namespace lpips_fast {

constexpr int64_t kImageChannels = 3;

inline void check_images(const std::vector<torch::stable::Tensor>& images,
                         const torch::stable::Tensor& shift, const torch::stable::Tensor& scale,
                         torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(!images.empty(), "expected at least one batch of images");
  STD_TORCH_CHECK(shift.numel() == kImageChannels && scale.numel() == kImageChannels,
                  "expected a shift and a scale for each of 3 channels");
  STD_TORCH_CHECK(is_feature_dtype(dtype), "the result must be a floating dtype");
  for (const torch::stable::Tensor& image : images) {
    STD_TORCH_CHECK(image.dim() == 4 && image.size(1) == kImageChannels &&
                        image.size(2) == images[0].size(2) && image.size(3) == images[0].size(3),
                    "expected batches of images (N, 3, H, W) of one size");
    STD_TORCH_CHECK(is_feature_dtype(image.scalar_type()), "images must be of a floating dtype");
  }
}

inline torch::stable::Tensor empty_scaled_batch(const std::vector<torch::stable::Tensor>& images,
                                                torch::headeronly::ScalarType dtype) {
  int64_t batch = 0;
  for (const torch::stable::Tensor& image : images) batch += image.size(0);
  return torch::stable::empty({batch, kImageChannels, images[0].size(2), images[0].size(3)}, dtype,
                              std::nullopt, images[0].device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace lpips_fast
