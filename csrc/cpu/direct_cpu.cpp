// Torch's side of the direct convolution: checks, packing, borders, work division, registration.
#include "direct_cpu.h"

#include <algorithm>
#include <optional>

#include "channels_last_tensors.h"

namespace lpips_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor pack(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) &&
                      weight.scalar_type() == ScalarType::Float,
                  "direct_pack takes a float32 weight (C_out, C_in, k, k)");
  const Tensor packed =
      empty_floats({direct_packed_size(weight.size(2), weight.size(1), weight.size(0))});
  direct_pack(static_cast<const float*>(weight.const_data_ptr()),
              {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
              weight.size(2), weight.size(1), weight.size(0),
              static_cast<float*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor conv2d(Tensor x, Tensor packed, std::optional<Tensor> bias, bool relu, int64_t out_channels,
              int64_t kernel, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float,
                  "direct_conv2d takes float32 images (N, C, H, W)");
  STD_TORCH_CHECK(kernel >= 1 && stride >= 1 && padding >= 0,
                  "expected a kernel and a stride of at least 1 and a padding");
  STD_TORCH_CHECK(out_channels >= 1 && x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1,
                  "expected at least one channel, row and column");
  STD_TORCH_CHECK(x.size(2) + 2 * padding >= kernel && x.size(3) + 2 * padding >= kernel,
                  "images of ", x.size(2), "x", x.size(3), " are smaller than the kernel");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == out_channels &&
                            bias->is_contiguous() && bias->scalar_type() == ScalarType::Float),
                  "expected a contiguous float32 bias of ", out_channels, " channels");
  x = with_dense_channels(x);
  const int64_t batch = x.size(0), channels = x.size(1);
  const int64_t height = (x.size(2) + 2 * padding - kernel) / stride + 1;
  const int64_t width = (x.size(3) + 2 * padding - kernel) / stride + 1;
  const float* weights = packed_weight(packed, direct_packed_size(kernel, channels, out_channels));
  const Tensor y = empty_images(batch, out_channels, height, width);
  if (y.numel() == 0) return y;
  if (padding > 0) x = with_border(positions_of(x), padding, batch, channels, x.size(2), x.size(3));
  direct_convolve({.width = width,
                   .kernel = kernel,
                   .stride = stride,
                   .in_channels = channels,
                   .out_channels = out_channels,
                   .images = positions_of(x),
                   .packed = weights,
                   .epilogue = {.bias = pointer_to(bias), .relu = relu},
                   .results = positions_to(y)},
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

Tensor with_border(const Positions<const float>& images, int64_t border, int64_t batch,
                   int64_t channels, int64_t height, int64_t width) {
  const Tensor bordered = empty_images(batch, channels, height + 2 * border, width + 2 * border);
  const Positions<float> to = positions_to(bordered);
  for_rows(batch, height, width * channels, [&](int64_t n, int64_t first, int64_t last) {
    clear_border(to, border, channels, height, width, n, first, last);
    for (int64_t y = first; y < last; ++y) {
      if (images.column == channels) {
        std::copy_n(images.at(n, y, 0), width * channels, to.at(n, y + border, border));
      } else {
        for (int64_t x = 0; x < width; ++x)
          std::copy_n(images.at(n, y, x), channels, to.at(n, y + border, x + border));
      }
    }
  });
  return bordered;
}

const float* packed_weight(const Tensor& packed, int64_t size) {
  STD_TORCH_CHECK(
      packed.numel() == size && packed.is_contiguous() && packed.scalar_type() == ScalarType::Float,
      "a weight was not packed for these channels");
  return static_cast<const float*>(packed.const_data_ptr());
}

}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("direct_pack", TORCH_BOX(&lpips_fast::pack));
  m.impl("direct_conv2d", TORCH_BOX(&lpips_fast::conv2d));
}
