// The direct convolution of a batch, on all of torch's threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../stable_abi.h"
#include "direct_kernels.h"
#include "parallel.h"

namespace lpips_fast {

// Calls body(n, first, last) for the rows `first` to `last` of every image, in all. A task is some
// rows of one image: enough to outweigh waking a thread.
template <typename Body>
void for_rows(int64_t batch, int64_t height, int64_t multiplications_per_row, const Body& body) {
  constexpr int64_t kMultiplicationsPerTask = 256 * 1024;
  const int64_t grain =
      std::max<int64_t>(1, kMultiplicationsPerTask / std::max<int64_t>(1, multiplications_per_row));
  parallel_for(0, batch * height, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t n = begin / height, first = begin % height;
      const int64_t last = std::min(height, first + end - begin);
      body(n, first, last);
      begin += last - first;
    }
  });
}

void direct_convolve(const DirectConvolution& convolution, int64_t batch, int64_t height);

// Zeros around rows `first` to `last` of image n of (height, width) without its border, and above
// the first and below the last row of the image.
void clear_border(const Positions<float>& images, int64_t border, int64_t channels, int64_t height,
                  int64_t width, int64_t n, int64_t first, int64_t last);

// Position (border, border) of images on, and of these the channels from `first_channel` on.
template <typename T>
Positions<T> part(const Positions<T>& all, int64_t border, int64_t first_channel) {
  Positions<T> inner = all;
  inner.data = all.at(0, border, border) + first_channel;
  return inner;
}

// As direct_pack leaves a weight: refuses any but what convolves these channels.
const float* direct_packed(const char* name, const torch::stable::Tensor& packed, int64_t kernel,
                           int64_t in_channels, int64_t out_channels);

}  // namespace lpips_fast
