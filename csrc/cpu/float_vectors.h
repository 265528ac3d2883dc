// Vectors of float32 for the convolutions, in the width of the library's instruction set.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <type_traits>

#include "convolution_epilogue.h"

namespace lpips_fast {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();

// `count` numbers of float32, bfloat16 or float16 as float32; lanes beyond are 0.
template <typename scalar_t>
Vec load(const scalar_t* from, int64_t count) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return count == kLanes ? Vec::loadu(from) : Vec::loadu(from, count);
  } else if (count == kLanes) {
    Vec value;
    at::vec::load_to_float<scalar_t>(from, value);
    return value;
  } else {
    float part[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = static_cast<float>(from[i]);
    return Vec::loadu(part);
  }
}

// Rounded to scalar_t.
template <typename scalar_t>
void store(const Vec& value, scalar_t* to, int64_t count) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    count == kLanes ? value.store(to) : value.store(to, static_cast<int>(count));
  } else {
    at::vec::convert_from_float<scalar_t>(value, value).store(to, static_cast<int>(count));
  }
}

// The epilogue of `count` channels from channel c on, at positions (n, y, x), (n, y, x + 1), ...
// Inline by force: a 1x1 convolution has little else to do than to write its results.
template <typename scalar_t>
class RowEpilogue {
 public:
  C10_ALWAYS_INLINE RowEpilogue(const ConvolutionEpilogue<scalar_t>& epilogue,
                                const Positions<scalar_t>& results, int64_t n, int64_t y, int64_t x,
                                int64_t c, int64_t count)
      : bias_(epilogue.bias ? load(epilogue.bias + c, count) : Vec(0.f)),
        to_(results.at(n, y, x) + c),
        add_(epilogue.add ? epilogue.add.at(n, y, x) + c : nullptr),
        mask_(epilogue.mask ? epilogue.mask.at(n, y, x) + c : nullptr),
        column_(results.column),
        add_column_(epilogue.add.column),
        mask_column_(epilogue.mask.column),
        count_(count),
        relu_(epilogue.relu) {}

  // Writes a sum as the result of the position r columns further on.
  C10_ALWAYS_INLINE void finish(Vec value, int64_t r) const {
    const Vec zero(0.f);
    value = value + bias_;
    if (add_) value = value + load(add_ + r * add_column_, count_);
    if (relu_) value = at::vec::maximum(value, zero);
    if (mask_) value = Vec::blendv(value, zero, load(mask_ + r * mask_column_, count_) <= zero);
    store(value, to_ + r * column_, count_);
  }

 private:
  Vec bias_;
  scalar_t* to_;
  const scalar_t *add_, *mask_;
  int64_t column_, add_column_, mask_column_, count_;
  bool relu_;
};

}  // namespace lpips_fast
