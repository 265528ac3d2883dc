// Channels-last images as torch's tensors, and these as the convolutions' positions.
#pragma once

#include <initializer_list>
#include <optional>

#include "../allocation.h"
#include "convolution_epilogue.h"

namespace lpips_fast {

// Uninitialised float32 memory of 64-byte alignment, on the CPU.
inline Tensor empty_floats(std::initializer_list<int64_t> shape) {
  return empty(shape, ScalarType::Float, cpu());
}

// Uninitialised images (N, C, H, W), channels-last, on the CPU.
inline Tensor empty_images(int64_t batch, int64_t channels, int64_t height, int64_t width,
                           ScalarType dtype = ScalarType::Float) {
  return empty({batch, channels, height, width}, dtype, cpu(), MemoryFormat::ChannelsLast);
}

// `x` itself where its channels lie one beside the other, else a channels-last copy.
inline Tensor with_dense_channels(const Tensor& x) {
  if (x.size(1) == 1 || x.stride(1) == 1) return x;
  return dense(x, MemoryFormat::ChannelsLast);
}

// The stride of a dimension of size 1 is arbitrary, and of no use but for a block of columns.
inline int64_t column_stride(const Tensor& x) { return x.size(3) > 1 ? x.stride(3) : x.size(1); }

template <typename scalar_t = float>
Positions<const scalar_t> positions_of(const Tensor& x) {
  return {static_cast<const scalar_t*>(x.const_data_ptr()), x.stride(0), x.stride(2),
          column_stride(x)};
}

template <typename scalar_t = float>
Positions<scalar_t> positions_to(const Tensor& x) {
  return {static_cast<scalar_t*>(x.mutable_data_ptr()), x.stride(0), x.stride(2), column_stride(x)};
}

inline const float* pointer_to(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

}  // namespace lpips_fast
