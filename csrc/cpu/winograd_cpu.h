// Winograd's convolution of a batch, on all of torch's threads.
#pragma once

#include "winograd_kernels.h"

namespace lpips_fast {

struct WinogradConvolution {
  WinogradImage image;
  Positions<const float> images;
  const float* weights;  // as the operator winograd_pack leaves them
  ConvolutionEpilogue epilogue;
  Positions<float> results;
};

// The numbers of packed weights of kernel x kernel.
int64_t winograd_packed_size(int64_t kernel, int64_t in_channels, int64_t out_channels);

void winograd_convolve(const WinogradConvolution& convolution, int64_t batch);

}  // namespace lpips_fast
