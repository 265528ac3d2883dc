// Sizes of a max-pooling, free of torch, for the CPU kernels, the CUDA kernels and their emulation.
#pragma once

#include <cstdint>

namespace lpips_fast {

// Square windows without padding or dilation; the last one may hang over the edge (ceil_mode).
struct PoolShape {
  int64_t channels, height, width, out_height, out_width, kernel, stride;
};

// 0 where no window fits, as torch has it. Kernel and stride are at most kMaxParameter (sizes.h).
inline int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, bool ceil_mode) {
  const int64_t room = size - kernel + (ceil_mode ? stride - 1 : 0);
  if (room < 0) return 0;
  const int64_t out = room / stride + 1;
  // A window may hang over the edge, but not start beyond it.
  return ceil_mode && (out - 1) * stride >= size ? out - 1 : out;
}

}  // namespace lpips_fast
