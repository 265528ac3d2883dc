// Torch's side of the direct convolution: checks, packing, borders, work division, registration.
#include "direct_cpu.h"

#include <algorithm>
#include <array>
#include <optional>

#include "../convolution.h"
#include "channels_last_tensors.h"

namespace lpips_fast {
namespace {

// Numbers lie in the order of reading (direct_kernels.h); the shape says what they are for.
std::array<int64_t, 4> packed_shape(int64_t kernel, int64_t in_channels, int64_t out_channels) {
  return {kernel, kernel, in_channels, direct_packed_channels(out_channels)};
}

Tensor pack(Tensor weight) {
  check_weight_to_pack("direct_pack", weight);
  const auto shape = packed_shape(weight.size(2), weight.size(1), weight.size(0));
  const Tensor packed = empty_floats({shape[0], shape[1], shape[2], shape[3]});
  if (packed.numel() == 0) return packed;
  direct_pack(static_cast<const float*>(weight.const_data_ptr()),
              {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
              weight.size(2), weight.size(1), weight.size(0),
              static_cast<float*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor conv2d(Tensor x, Tensor packed, std::optional<Tensor> bias, bool relu, int64_t out_channels,
              int64_t kernel, int64_t stride, int64_t padding) {
  Operands(Backend::kCPU).check("x", x).check("packed", packed).check("bias", bias);
  LPIPS_FAST_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float,
                   "direct_conv2d takes float32 images (N, C, H, W), got ", description_of(x));
  const ConvolutionGeometry geometry{out_channels, kernel, stride, padding};
  check_convolution("direct_conv2d", x, geometry);
  check_bias(bias, out_channels);
  const int64_t batch = x.size(0), channels = x.size(1);
  const float* weights = direct_packed("the weight", packed, kernel, channels, out_channels);
  x = with_dense_channels(x);
  const int64_t height = geometry.results(x.size(2)), width = geometry.results(x.size(3));
  const Tensor y = empty_images(batch, out_channels, height, width);
  if (y.numel() == 0) return y;
  // Beyond, it steps over nothing.
  stride = std::min(stride, std::max(x.size(2), x.size(3)) + 2 * padding);
  direct_convolve({.width = width,
                   .kernel = kernel,
                   .stride = stride,
                   .in_channels = channels,
                   .out_channels = out_channels,
                   .images = positions_of(x),
                   .packed = weights,
                   .epilogue = {.bias = pointer_to(bias), .relu = relu},
                   .results = positions_to(y),
                   .padding = padding,
                   .in_height = x.size(2),
                   .in_width = x.size(3)},
                  batch, height);
  return y;
}

}  // namespace

void direct_convolve(const DirectConvolution& convolution, int64_t batch, int64_t height) {
  const int64_t multiplications = convolution.width * convolution.kernel * convolution.kernel *
                                  convolution.in_channels * convolution.out_channels;
  for_rows(batch, height, multiplications, [&](int64_t n, int64_t first, int64_t last) {
    direct_convolve_rows(convolution, n, first, last);
  });
}

void clear_border(const Positions<float>& images, int64_t border, int64_t channels, int64_t height,
                  int64_t width, int64_t n, int64_t first, int64_t last) {
  const auto clear = [&](int64_t y, int64_t x, int64_t count) {
    std::fill_n(images.at(n, y, x), count * channels, 0.f);
  };
  for (int64_t y = 0; y < border; ++y) {
    if (first == 0) clear(y, 0, width + 2 * border);
    if (last == height) clear(height + border + y, 0, width + 2 * border);
  }
  for (int64_t y = first + border; y < last + border; ++y) {
    clear(y, 0, border);
    clear(y, width + border, border);
  }
}

const float* direct_packed(const char* name, const Tensor& packed, int64_t kernel,
                           int64_t in_channels, int64_t out_channels) {
  const auto shape = packed_shape(kernel, in_channels, out_channels);
  check_packed(name, packed, {shape[0], shape[1], shape[2], shape[3]});
  return static_cast<const float*>(packed.const_data_ptr());
}

}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("direct_pack", TORCH_BOX(&lpips_fast::pack));
  m.impl("direct_conv2d", TORCH_BOX(&lpips_fast::conv2d));
}
