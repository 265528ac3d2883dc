// Winograd's convolution of a batch, on all of torch's threads.
#pragma once

#include "winograd_kernels.h"

namespace lpips_fast {

template <typename scalar_t>
struct WinogradConvolution {
  WinogradImage image;
  Positions<const scalar_t> images;
  const float* weights;  // as the operator winograd_pack leaves them
  ConvolutionEpilogue<scalar_t> epilogue;
  Positions<scalar_t> results;
};

// The numbers of packed weights of kernel x kernel.
int64_t winograd_packed_size(int64_t kernel, int64_t in_channels, int64_t out_channels);

// For float, c10::BFloat16 and c10::Half.
template <typename scalar_t>
void winograd_convolve(const WinogradConvolution<scalar_t>& convolution, int64_t batch);

}  // namespace lpips_fast
