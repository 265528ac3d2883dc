// Winograd's convolution of a batch, on all of torch's threads.
#pragma once

#include "../stable_abi.h"
#include "winograd_kernels.h"

namespace lpips_fast {

template <typename scalar_t>
struct WinogradConvolution {
  WinogradImage image;
  Positions<const scalar_t> images;
  const float* weights;  // as the operator winograd_pack leaves them
  ConvolutionEpilogue<scalar_t> epilogue;
  Positions<scalar_t> results;
  // As features ask for it, a gradient does not: outliers apart, the sum along channels in short
  // runs.
  bool precise;
};

// As winograd_pack leaves a weight: refuses any but what convolves these channels.
const float* winograd_packed(const char* name, const torch::stable::Tensor& packed, int64_t kernel,
                             int64_t in_channels, int64_t out_channels);

// For float, c10::BFloat16 and c10::Half.
template <typename scalar_t>
void winograd_convolve(const WinogradConvolution<scalar_t>& convolution, int64_t batch);

}  // namespace lpips_fast
