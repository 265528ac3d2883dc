// What the convolutions accept, for all their implementations.
//
//   direct_pack(weight) -> packed            winograd_pack(weight) -> packed
//   direct_conv2d(x, packed, bias?, relu, out_channels, kernel, stride, padding) -> y
//   winograd_conv2d(..., mask?, ..., add?, precise) -> y
//
// x is (N, C, H, W), y (N, out_channels, H', W') and channels-last. Packed weights carry the shape
// of what they were packed for: they fit one kernel size, one number of channels in and one
// vector's or panel's worth of numbers of channels out.
#pragma once

#include "checks.h"

namespace lpips_fast {

// Square kernels with borders of zeros, without dilation or groups.
struct ConvolutionGeometry {
  int64_t out_channels, kernel, stride, padding;

  // Along one dimension, once check_convolution has passed.
  int64_t results(int64_t size) const { return (size + 2 * padding - kernel) / stride + 1; }
};

inline void check_convolution(const char* name, const Tensor& x,
                              const ConvolutionGeometry& geometry) {
  check_parameter("out_channels", geometry.out_channels, 1);
  check_parameter("kernel", geometry.kernel, 1);
  check_parameter("stride", geometry.stride, 1);
  check_parameter("padding", geometry.padding, 0);
  LPIPS_FAST_CHECK(x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1, name,
                   " takes images of at least one channel, row and column, got ", shape_of(x));
  const int64_t border = 2 * geometry.padding;
  LPIPS_FAST_CHECK(x.size(2) + border >= geometry.kernel && x.size(3) + border >= geometry.kernel,
                   "images of ", x.size(2), "x", x.size(3), " with a padding of ", geometry.padding,
                   " are smaller than the kernel of ", geometry.kernel, "x", geometry.kernel);
}

inline void check_weight_to_pack(const char* name, const Tensor& weight) {
  Operands(Backend::kCPU).check("weight", weight);
  LPIPS_FAST_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) && weight.size(2) >= 1 &&
                       weight.scalar_type() == ScalarType::Float,
                   name, " takes a float32 weight (C_out, C_in, k, k), got ",
                   description_of(weight));
  for (int64_t d = 0; d < 4; ++d) check_parameter("a size of the weight", weight.size(d), 0);
}

inline void check_packed(const char* name, const Tensor& packed,
                         std::initializer_list<int64_t> shape) {
  LPIPS_FAST_CHECK(has_shape(packed, shape) && packed.is_contiguous() &&
                       packed.scalar_type() == ScalarType::Float,
                   name, " was not packed for these channels and this kernel: expected ",
                   shape_text(shape), " Float, got ", description_of(packed));
}

inline void check_bias(const Tensor& bias, int64_t channels) {
  LPIPS_FAST_CHECK(has_shape(bias, {channels}) && bias.is_contiguous() &&
                       bias.scalar_type() == ScalarType::Float,
                   "expected a contiguous float32 bias of ", channels, " channels, got ",
                   description_of(bias));
}

inline void check_bias(const std::optional<Tensor>& bias, int64_t channels) {
  if (bias) check_bias(*bias, channels);
}

// An argument with a number for each of the result's.
inline void check_like_result(const char* name, const std::optional<Tensor>& t,
                              std::initializer_list<int64_t> shape, ScalarType dtype) {
  LPIPS_FAST_CHECK(!t || (has_shape(*t, shape) && t->scalar_type() == dtype), name,
                   " must have the shape and dtype of the result, ", shape_text(shape), " ",
                   torch::headeronly::toString(dtype), ", got ", t ? description_of(*t) : "");
}

}  // namespace lpips_fast
