// Vectors of float32 for the convolutions, in the width of the library's instruction set.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "convolution_epilogue.h"

namespace lpips_fast {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();

inline Vec load(const float* from, int64_t count) {
  return count == kLanes ? Vec::loadu(from) : Vec::loadu(from, count);
}

inline void store(const Vec& value, float* to, int64_t count) {
  count == kLanes ? value.store(to) : value.store(to, static_cast<int>(count));
}

// Writes `value` plus `bias`, the vector of it for these channels, as channels c to c + count of
// position (n, y, x).
inline void finish(Vec value, const Vec& bias, const ConvolutionEpilogue& epilogue,
                   const Positions<float>& results, int64_t n, int64_t y, int64_t x, int64_t c,
                   int64_t count) {
  const Vec zero(0.f);
  value = value + bias;
  if (epilogue.add) value = value + load(epilogue.add.at(n, y, x) + c, count);
  if (epilogue.relu) value = at::vec::maximum(value, zero);
  if (epilogue.mask) {
    const Vec mask = load(epilogue.mask.at(n, y, x) + c, count);
    value = Vec::blendv(value, zero, mask <= zero);
  }
  store(value, results.at(n, y, x) + c, count);
}

}  // namespace lpips_fast
