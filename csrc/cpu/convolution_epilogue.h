// What the convolutions share: where channels lie, and what becomes of a result.
#pragma once

#include <cstdint>

namespace lpips_fast {

// Where the channels of a batch's positions lie: those of image n, row y and column x, one beside
// the other, from at(n, y, x) on. Any part of a channels-last batch, by rows, columns or channels.
template <typename T>
struct Positions {
  T* data = nullptr;
  int64_t image = 0, row = 0, column = 0;  // from one to the next one

  T* at(int64_t n, int64_t y, int64_t x) const { return data + n * image + y * row + x * column; }
  explicit operator bool() const { return data != nullptr; }
};

// What becomes of a result before it is written: plus `bias` (C_out,) and `add`, then max(., 0),
// which keeps NaN, and 0 wherever `mask` is 0 or below. Each is left out where null or false.
// scalar_t is the images' dtype; sums and the bias are float32 in any.
template <typename scalar_t>
struct ConvolutionEpilogue {
  const float* bias = nullptr;
  Positions<const scalar_t> add = {};
  bool relu = false;
  Positions<const scalar_t> mask = {};
};

}  // namespace lpips_fast
