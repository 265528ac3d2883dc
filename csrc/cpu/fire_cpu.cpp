// SqueezeNet's fire module (Iandola et al. 2016), float32, channels-last: a 1x1 convolution
// ("squeeze"), and on what its ReLU leaves a 1x1 and a 3x3 ("expand") side by side, each with a
// ReLU. One call instead of three convolutions and a concatenation: both write their channels of
// one result.
//
// Memory: reads the images once, writes the result once; the squeezed images between them, a
// quarter or less in size, are written with the border of zeros that the 3x3 sums over.
#include <algorithm>
#include <tuple>

#include "channels_last_tensors.h"
#include "direct_kernels.h"
#include "winograd_cpu.h"

namespace lpips_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kBorder = 1;
// A task is some rows of one image: enough to outweigh waking a thread.
constexpr int64_t kMultiplicationsPerTask = 256 * 1024;

Tensor direct_pack_weight(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) &&
                      (weight.size(2) == 1 || weight.size(2) == 3) &&
                      weight.scalar_type() == ScalarType::Float,
                  "direct_pack takes a float32 weight (C_out, C_in, 1, 1) or (C_out, C_in, 3, 3)");
  const Tensor packed =
      empty_floats({direct_packed_size(weight.size(2), weight.size(1), weight.size(0))});
  direct_pack(static_cast<const float*>(weight.const_data_ptr()),
              {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
              weight.size(2), weight.size(1), weight.size(0),
              static_cast<float*>(packed.mutable_data_ptr()));
  return packed;
}

// Calls body(n, first, last) for the rows `first` to `last` of every image, in all.
template <typename Body>
void for_rows(int64_t batch, int64_t height, int64_t multiplications, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kMultiplicationsPerTask / multiplications);
  parallel_for(0, batch * height, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t n = begin / height, first = begin % height;
      const int64_t last = std::min(height, first + end - begin);
      body(n, first, last);
      begin += last - first;
    }
  });
}

// Blocks of rows between two passes over all panels: their inputs stay in the L2 cache.
constexpr int64_t kFloatsOfRows = 64 * 1024;

void convolve_rows(const DirectConvolution& convolution, int64_t n, int64_t first, int64_t last) {
  const int64_t row = convolution.width * (convolution.in_channels + convolution.out_channels);
  const int64_t step = std::max<int64_t>(1, kFloatsOfRows / row);
  for (int64_t y = first; y < last; y += step)
    direct_convolve_rows(convolution, n, y, std::min(last, y + step));
}

int64_t multiplications_per_row(const DirectConvolution& c) {
  return c.width * c.kernel * c.kernel * c.in_channels * c.out_channels;
}

void convolve(const DirectConvolution& convolution, int64_t batch, int64_t height) {
  for_rows(
      batch, height, multiplications_per_row(convolution),
      [&](int64_t n, int64_t first, int64_t last) { convolve_rows(convolution, n, first, last); });
}

// Zeros around the rows `first` to `last` of image n, and above and below the first and the last.
void clear_border(const Positions<float>& images, int64_t channels, int64_t height, int64_t width,
                  int64_t n, int64_t first, int64_t last) {
  const auto clear = [&](int64_t y, int64_t x, int64_t count) {
    std::fill_n(images.at(n, y, x), count * channels, 0.f);
  };
  if (first == 0) clear(0, 0, width + 2 * kBorder);
  if (last == height) clear(height + kBorder, 0, width + 2 * kBorder);
  for (int64_t y = first + kBorder; y < last + kBorder; ++y) {
    clear(y, 0, kBorder);
    clear(y, width + kBorder, kBorder);
  }
}

template <typename T>
Positions<T> part(const Positions<T>& all, int64_t border, int64_t first_channel) {
  Positions<T> inner = all;
  inner.data = all.at(0, border, border) + first_channel;
  return inner;
}

const float* packed_weight(const Tensor& packed, int64_t size) {
  STD_TORCH_CHECK(
      packed.numel() == size && packed.is_contiguous() && packed.scalar_type() == ScalarType::Float,
      "a weight was not packed for these channels");
  return static_cast<const float*>(packed.const_data_ptr());
}

const float* bias_pointer(const Tensor& bias) {
  STD_TORCH_CHECK(
      bias.dim() == 1 && bias.is_contiguous() && bias.scalar_type() == ScalarType::Float,
      "expected contiguous float32 biases");
  return static_cast<const float*>(bias.const_data_ptr());
}

void check_images(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float,
                  "fire takes float32 images (N, C, H, W)");
}

// `images` with a border of zeros, for the direct 3x3 convolution.
Tensor with_border(const Positions<const float>& images, int64_t batch, int64_t channels,
                   int64_t height, int64_t width) {
  const Tensor bordered = empty_images(batch, channels, height + 2 * kBorder, width + 2 * kBorder);
  const Positions<float> to = positions_to(bordered);
  for_rows(batch, height, width * channels, [&](int64_t n, int64_t first, int64_t last) {
    clear_border(to, channels, height, width, n, first, last);
    for (int64_t y = first; y < last; ++y)
      for (int64_t x = 0; x < width; ++x)
        std::copy_n(images.at(n, y, x), channels, to.at(n, y + kBorder, x + kBorder));
  });
  return bordered;
}

// The squeezed images with their border (N, S, H + 2, W + 2), and the result (N, 2 E, H, W).
std::tuple<Tensor, Tensor> fire(Tensor x, Tensor squeeze, Tensor squeeze_bias, Tensor expand1x1,
                                Tensor expand1x1_bias, Tensor expand3x3, Tensor expand3x3_bias,
                                bool winograd) {
  check_images(x);
  x = with_dense_channels(x);
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
  const int64_t narrow = squeeze_bias.numel(), wide = expand1x1_bias.numel();
  STD_TORCH_CHECK(expand3x3_bias.numel() == wide, "both expansions must have as many channels");
  const Tensor squeezed = empty_images(batch, narrow, height + 2 * kBorder, width + 2 * kBorder);
  const Tensor y = empty_images(batch, 2 * wide, height, width);
  if (y.numel() == 0) return {squeezed, y};

  const Positions<float> bordered = positions_to(squeezed), results = positions_to(y);
  const DirectConvolution squeezing{
      width,
      1,
      x.size(1),
      narrow,
      positions_of(x),
      packed_weight(squeeze, direct_packed_size(1, x.size(1), narrow)),
      {bias_pointer(squeeze_bias), {}, true},
      part(bordered, kBorder, 0)};
  for_rows(batch, height, multiplications_per_row(squeezing),
           [&](int64_t n, int64_t first, int64_t last) {
             clear_border(bordered, narrow, height, width, n, first, last);
             convolve_rows(squeezing, n, first, last);
           });

  const Positions<const float> images = positions_of(squeezed);
  convolve({width,
            1,
            narrow,
            wide,
            part(images, kBorder, 0),
            packed_weight(expand1x1, direct_packed_size(1, narrow, wide)),
            {bias_pointer(expand1x1_bias), {}, true},
            results},
           batch, height);
  const ConvolutionEpilogue epilogue{bias_pointer(expand3x3_bias), {}, true};
  if (winograd) {
    const int64_t size = winograd_packed_size(3, narrow, wide);
    winograd_convolve(
        {{height, width, wide, height + 2 * kBorder, width + 2 * kBorder, narrow, 1, 0, 3},
         images,
         packed_weight(expand3x3, size),
         epilogue,
         part(results, 0, wide)},
        batch);
  } else {
    const int64_t size = direct_packed_size(3, narrow, wide);
    convolve({width, 3, narrow, wide, images, packed_weight(expand3x3, size), epilogue,
              part(results, 0, wide)},
             batch, height);
  }
  return {squeezed, y};
}

// The gradient to `x`, from the gradient to the result before its ReLUs. Weights are those of the
// convolutions that are the gradients: flipped, channels in and out swapped. `through_relu`: x is
// itself the result of a ReLU, whose derivative is applied too.
Tensor fire_backward(Tensor grad, Tensor x, Tensor squeezed, Tensor squeeze, Tensor expand1x1,
                     Tensor expand3x3, bool through_relu, bool winograd) {
  check_images(grad);
  check_images(x);
  check_images(squeezed);
  grad = with_dense_channels(grad);
  x = with_dense_channels(x);
  squeezed = with_dense_channels(squeezed);
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3), channels = x.size(1);
  const int64_t narrow = squeezed.size(1), wide = grad.size(1) / 2;
  STD_TORCH_CHECK(grad.size(0) == batch && grad.size(1) == 2 * wide && grad.size(2) == height &&
                      grad.size(3) == width && squeezed.size(0) == batch &&
                      squeezed.size(2) == height + 2 * kBorder &&
                      squeezed.size(3) == width + 2 * kBorder,
                  "grad, x and squeezed do not belong together");
  const Tensor grad_x = empty_images(batch, channels, height, width);
  if (grad_x.numel() == 0) return grad_x;

  const Tensor grad_squeezed = empty_images(batch, narrow, height, width);
  const Positions<const float> grads = positions_of(grad);
  convolve({width,
            1,
            wide,
            narrow,
            grads,
            packed_weight(expand1x1, direct_packed_size(1, wide, narrow)),
            {},
            positions_to(grad_squeezed)},
           batch, height);
  const Positions<const float> grads3x3 = part(grads, 0, wide);
  const ConvolutionEpilogue epilogue{nullptr, positions_of(grad_squeezed), false,
                                     part(positions_of(squeezed), kBorder, 0)};
  if (winograd) {
    const int64_t size = winograd_packed_size(3, wide, narrow);
    winograd_convolve({{height, width, narrow, height, width, wide, 1, kBorder, 3},
                       grads3x3,
                       packed_weight(expand3x3, size),
                       epilogue,
                       positions_to(grad_squeezed)},
                      batch);
  } else {
    const Tensor bordered = with_border(grads3x3, batch, wide, height, width);
    const int64_t size = direct_packed_size(3, wide, narrow);
    convolve({width, 3, wide, narrow, positions_of(bordered), packed_weight(expand3x3, size),
              epilogue, positions_to(grad_squeezed)},
             batch, height);
  }
  const Positions<const float> mask = through_relu ? positions_of(x) : Positions<const float>{};
  convolve({width,
            1,
            narrow,
            channels,
            positions_of(grad_squeezed),
            packed_weight(squeeze, direct_packed_size(1, narrow, channels)),
            {nullptr, {}, false, mask},
            positions_to(grad_x)},
           batch, height);
  return grad_x;
}

}  // namespace
}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("direct_pack", TORCH_BOX(&lpips_fast::direct_pack_weight));
  m.impl("fire", TORCH_BOX(&lpips_fast::fire));
  m.impl("fire_backward", TORCH_BOX(&lpips_fast::fire_backward));
}
