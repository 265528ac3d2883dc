// Direct convolution of channels-last images, float32: for 1x1 weights, and for few channels, where
// Winograd's transforms cost more than they save.
//
// An implicit matrix product: up to 12 positions of a row (6 with AVX2) times two vectors of output
// channels stay in registers while the sum runs over the kernel and the input channels; a factor is
// broadcast from the image, vectors come from weights packed in the order of reading. Compute-bound
// from some 16 input channels on: 24 multiply-adds for 14 loads.
//
// Memory: images are read once from memory (3x3: rows twice more from a cache) and results written
// once; a group of positions reads all weights, from the L1 or L2 cache. A group that meets the
// zeros around an image reads a copy of its window, a few kilobytes, that holds them.
//
// Every result is one chain of fused multiply-adds: the same bits wherever it lies in a group.
#pragma once

#include <cstdint>

#include "convolution_epilogue.h"

namespace lpips_fast {

struct DirectConvolution {
  int64_t width;  // positions of a row of results
  int64_t kernel, stride, in_channels, out_channels;
  Positions<const float> images;
  const float* packed;
  ConvolutionEpilogue<float> epilogue;
  Positions<float> results;
  // Zeros around the images, whose size is asked for only where there are any.
  int64_t padding = 0, in_height = 0, in_width = 0;
};

// (C_out, C_in, k, k) as the kernel reads it: k * k * C_in * direct_packed_channels(C_out) numbers,
// of which those of channels beyond C_out are zero.
int64_t direct_packed_channels(int64_t out_channels);
void direct_pack(const float* weight, const int64_t (&strides)[4], int64_t kernel,
                 int64_t in_channels, int64_t out_channels, float* packed);

// Rows `first` to `last` of the results of image n.
void direct_convolve_rows(const DirectConvolution& convolution, int64_t n, int64_t first,
                          int64_t last);

}  // namespace lpips_fast
