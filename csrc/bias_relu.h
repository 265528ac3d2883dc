// What bias_relu_ accepts: bias_relu_(y, bias) makes y = relu(y + bias) in place, for a dense
// channels-last batch y of (N, C, H, W) and a bias of (C,) in its dtype.
#pragma once

#include <cstdint>

#include "allocation.h"
#include "checks.h"

namespace lpips_fast {

inline void check_bias_relu(Backend backend, const Tensor& y, const Tensor& bias) {
  Operands(backend).check("y", y).check("bias", bias);
  check_images("bias_relu_", y);
  LPIPS_FAST_CHECK(y.numel() == 0 || is_dense(y, MemoryFormat::ChannelsLast),
                   "bias_relu_ writes in place and takes dense channels-last memory alone; call "
                   ".contiguous(memory_format=torch.channels_last) first");
  LPIPS_FAST_CHECK(has_shape(bias, {y.size(1)}) && bias.scalar_type() == y.scalar_type(),
                   "the bias must be (", y.size(1),
                   ",), one per channel, in the dtype of the images, got ", description_of(bias));
  if (y.numel() == 0) return;
  const auto begin = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr());
  };
  const auto end = [&](const Tensor& t) {
    const int64_t last = t.dim() == 1 ? (t.size(0) - 1) * t.stride(0) : t.numel() - 1;
    return begin(t) + static_cast<uintptr_t>(last + 1) * t.element_size();
  };
  LPIPS_FAST_CHECK(end(bias) <= begin(y) || end(y) <= begin(bias),
                   "the bias lies in the memory that bias_relu_ writes to; pass a copy of it");
}

}  // namespace lpips_fast
