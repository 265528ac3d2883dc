// SqueezeNet's fire module (Iandola et al. 2016), float32, channels-last: a 1x1 convolution
// ("squeeze"), and on what its ReLU leaves a 1x1 and a 3x3 ("expand") side by side, each with a
// ReLU. One call instead of three convolutions and a concatenation: both write their channels of
// one result.
//
// Memory: reads the images once, writes the result once; the squeezed images between them, a
// quarter or less in size, are written with the border of zeros that the 3x3 sums over.
#include <algorithm>
#include <tuple>

#include "../convolution.h"
#include "channels_last_tensors.h"
#include "direct_cpu.h"
#include "winograd_cpu.h"

namespace lpips_fast {
namespace {

constexpr int64_t kBorder = 1;

const float* pointer_to(const Tensor& bias) {
  return static_cast<const float*>(bias.const_data_ptr());
}

void check_fire_images(const char* name, const Tensor& x) {
  LPIPS_FAST_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float, name,
                   " must be float32 images (N, C, H, W), got ", description_of(x));
  LPIPS_FAST_CHECK(x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1, name,
                   " must have at least one channel, row and column, got ", shape_of(x));
}

// Refuses a weight of 3x3 that was packed for other channels.
const float* packed3x3(const char* name, const Tensor& packed, int64_t in_channels,
                       int64_t out_channels, bool winograd) {
  return (winograd ? winograd_packed : direct_packed)(name, packed, 3, in_channels, out_channels);
}

// A 3x3 convolution with stride 1 and a padding of 1, of which `border` is there already.
struct Convolution3x3 {
  Positions<const float> images;
  int64_t border, batch, height, width, in_channels, out_channels;
  ConvolutionEpilogue<float> epilogue;
  Positions<float> results;
  bool precise = false;  // as WinogradConvolution has it
};

// By Winograd's algorithm or directly.
void convolve3x3(const Convolution3x3& c, const float* weights, bool winograd) {
  if (winograd) {
    winograd_convolve<float>({.image = {.height = c.height,
                                        .width = c.width,
                                        .out_channels = c.out_channels,
                                        .in_height = c.height + 2 * c.border,
                                        .in_width = c.width + 2 * c.border,
                                        .in_channels = c.in_channels,
                                        .stride = 1,
                                        .padding = kBorder - c.border,
                                        .kernel = 3,
                                        .extent = 3},
                              .images = c.images,
                              .weights = weights,
                              .epilogue = c.epilogue,
                              .results = c.results,
                              .precise = c.precise},
                             c.batch);
    return;
  }
  direct_convolve({.width = c.width,
                   .kernel = 3,
                   .stride = 1,
                   .in_channels = c.in_channels,
                   .out_channels = c.out_channels,
                   .images = c.images,
                   .packed = weights,
                   .epilogue = c.epilogue,
                   .results = c.results,
                   .padding = kBorder - c.border,
                   .in_height = c.height + 2 * c.border,
                   .in_width = c.width + 2 * c.border},
                  c.batch, c.height);
}

// The squeezed images with their border (N, S, H + 2, W + 2), and the result (N, 2 E, H, W).
std::tuple<Tensor, Tensor> fire(Tensor x, Tensor squeeze, Tensor squeeze_bias, Tensor expand1x1,
                                Tensor expand1x1_bias, Tensor expand3x3, Tensor expand3x3_bias,
                                bool winograd) {
  Operands(Backend::kCPU)
      .check("x", x)
      .check("squeeze", squeeze)
      .check("squeeze_bias", squeeze_bias)
      .check("expand1x1", expand1x1)
      .check("expand1x1_bias", expand1x1_bias)
      .check("expand3x3", expand3x3)
      .check("expand3x3_bias", expand3x3_bias);
  check_fire_images("x", x);
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
  const int64_t narrow = squeeze_bias.numel(), wide = expand1x1_bias.numel();
  check_parameter("the number of squeezed channels", narrow, 1);
  check_parameter("the number of expanded channels", wide, 1);
  check_bias(squeeze_bias, narrow);
  check_bias(expand1x1_bias, wide);
  check_bias(expand3x3_bias, wide);
  const float* weights = direct_packed("squeeze", squeeze, 1, x.size(1), narrow);
  const float* weights1x1 = direct_packed("expand1x1", expand1x1, 1, narrow, wide);
  const float* weights3x3 = packed3x3("expand3x3", expand3x3, narrow, wide, winograd);
  x = with_dense_channels(x);
  const Tensor squeezed = empty_images(batch, narrow, height + 2 * kBorder, width + 2 * kBorder);
  const Tensor y = empty_images(batch, 2 * wide, height, width);
  if (y.numel() == 0) return {squeezed, y};

  const Positions<float> bordered = positions_to(squeezed), results = positions_to(y);
  const DirectConvolution squeezing{.width = width,
                                    .kernel = 1,
                                    .stride = 1,
                                    .in_channels = x.size(1),
                                    .out_channels = narrow,
                                    .images = positions_of(x),
                                    .packed = weights,
                                    .epilogue = {.bias = pointer_to(squeeze_bias), .relu = true},
                                    .results = part(bordered, kBorder, 0)};
  for_rows(batch, height, width * x.size(1) * narrow, [&](int64_t n, int64_t first, int64_t last) {
    clear_border(bordered, kBorder, narrow, height, width, n, first, last);
    direct_convolve_rows(squeezing, n, first, last);
  });

  const Positions<const float> images = positions_of(squeezed);
  direct_convolve({.width = width,
                   .kernel = 1,
                   .stride = 1,
                   .in_channels = narrow,
                   .out_channels = wide,
                   .images = part(images, kBorder, 0),
                   .packed = weights1x1,
                   .epilogue = {.bias = pointer_to(expand1x1_bias), .relu = true},
                   .results = results},
                  batch, height);
  convolve3x3({.images = images,
               .border = kBorder,
               .batch = batch,
               .height = height,
               .width = width,
               .in_channels = narrow,
               .out_channels = wide,
               .epilogue = {.bias = pointer_to(expand3x3_bias), .relu = true},
               .results = part(results, 0, wide),
               .precise = true},
              weights3x3, winograd);
  return {squeezed, y};
}

// The gradient to `x`, from the gradient to the result before its ReLUs. Weights are those of the
// convolutions that are the gradients: flipped, channels in and out swapped. `through_relu`: x is
// itself the result of a ReLU, whose derivative is applied too.
Tensor fire_backward(Tensor grad, Tensor x, Tensor squeezed, Tensor squeeze, Tensor expand1x1,
                     Tensor expand3x3, bool through_relu, bool winograd) {
  Operands(Backend::kCPU)
      .check("grad", grad)
      .check("x", x)
      .check("squeezed", squeezed)
      .check("squeeze", squeeze)
      .check("expand1x1", expand1x1)
      .check("expand3x3", expand3x3);
  check_fire_images("grad", grad);
  check_fire_images("x", x);
  check_fire_images("squeezed", squeezed);
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3), channels = x.size(1);
  const int64_t narrow = squeezed.size(1), wide = grad.size(1) / 2;
  LPIPS_FAST_CHECK(
      wide >= 1 && has_shape(grad, {batch, 2 * wide, height, width}) &&
          has_shape(squeezed, {batch, narrow, height + 2 * kBorder, width + 2 * kBorder}),
      "grad, x and squeezed do not belong together: ", shape_of(grad), ", ", shape_of(x), " and ",
      shape_of(squeezed));
  check_parameter("the number of channels", std::max({channels, narrow, wide}), 1);
  const float* weights = direct_packed("squeeze", squeeze, 1, narrow, channels);
  const float* weights1x1 = direct_packed("expand1x1", expand1x1, 1, wide, narrow);
  const float* weights3x3 = packed3x3("expand3x3", expand3x3, wide, narrow, winograd);
  grad = with_dense_channels(grad);
  x = with_dense_channels(x);
  squeezed = with_dense_channels(squeezed);
  const Tensor grad_x = empty_images(batch, channels, height, width);
  if (grad_x.numel() == 0) return grad_x;

  const Tensor grad_squeezed = empty_images(batch, narrow, height, width);
  const Positions<const float> grads = positions_of(grad);
  direct_convolve({.width = width,
                   .kernel = 1,
                   .stride = 1,
                   .in_channels = wide,
                   .out_channels = narrow,
                   .images = grads,
                   .packed = weights1x1,
                   .epilogue = {},
                   .results = positions_to(grad_squeezed)},
                  batch, height);
  convolve3x3({.images = part(grads, 0, wide),
               .border = 0,
               .batch = batch,
               .height = height,
               .width = width,
               .in_channels = wide,
               .out_channels = narrow,
               .epilogue = {.add = positions_of(grad_squeezed),
                            .mask = part(positions_of(squeezed), kBorder, 0)},
               .results = positions_to(grad_squeezed)},
              weights3x3, winograd);
  ConvolutionEpilogue<float> through;
  if (through_relu) through.mask = positions_of(x);
  direct_convolve({.width = width,
                   .kernel = 1,
                   .stride = 1,
                   .in_channels = narrow,
                   .out_channels = channels,
                   .images = positions_of(grad_squeezed),
                   .packed = weights,
                   .epilogue = through,
                   .results = positions_to(grad_x)},
                  batch, height);
  return grad_x;
}

}  // namespace
}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("fire", TORCH_BOX(&lpips_fast::fire));
  m.impl("fire_backward", TORCH_BOX(&lpips_fast::fire_backward));
}
