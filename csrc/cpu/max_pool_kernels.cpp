#include "max_pool_kernels.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "lanes.h"

namespace lpips_fast {
namespace {

struct Window {
  int64_t top, bottom, left, right;

  Window(const PoolShape& s, int64_t row, int64_t column)
      : top(row * s.stride),
        bottom(std::min(top + s.kernel, s.height)),
        left(column * s.stride),
        right(std::min(left + s.kernel, s.width)) {}

  // The first of the window's positions with the key of (row, column): both as row * width +
  // column.
  int64_t first_alike(const int64_t* keys, int64_t width, int64_t row, int64_t column) const {
    const int64_t own = row * width + column;
    if (keys == nullptr) return own;
    for (int64_t h = top; h <= row; ++h) {
      const int64_t end = h < row ? right : column;
      for (int64_t w = left; w < end; ++w)
        if (keys[h * width + w] == keys[own]) return h * width + w;
    }
    return own;
  }
};

}  // namespace

template <typename feature_t>
void max_pool_row(const feature_t* x, feature_t* y, const PoolShape& shape, int64_t out_row) {
  using L = Lanes<feature_t>;
  for (int64_t column = 0; column < shape.out_width; ++column) {
    const Window window(shape, out_row, column);
    feature_t* out = y + (out_row * shape.out_width + column) * shape.channels;
    for (int64_t c = 0; c < shape.channels; c += L::kStep) {
      const int64_t count = std::min(L::kStep, shape.channels - c);
      auto largest = L::fill(-std::numeric_limits<typename L::acc_t>::infinity());
      for (int64_t h = window.top; h < window.bottom; ++h) {
        for (int64_t w = window.left; w < window.right; ++w) {
          const auto value = L::load(x + (h * shape.width + w) * shape.channels + c, count);
          for (int v = 0; v < L::kVecs; ++v) largest[v] = at::vec::maximum(largest[v], value[v]);
        }
      }
      L::store(out + c, largest, count);
    }
  }
}

template <typename feature_t>
void max_pool_backward(const feature_t* grad_y, const feature_t* x, const feature_t* y,
                       const int64_t* keys, feature_t* grad_x, const PoolShape& shape,
                       int64_t begin, int64_t end) {
  using L = Lanes<feature_t>;
  for (int64_t p = 0; p < shape.height * shape.width; ++p)
    std::fill(grad_x + p * shape.channels + begin, grad_x + p * shape.channels + end, feature_t(0));
  const auto zero = L::fill(0);
  std::vector<int64_t> receivers(  // of a window's positions; a kernel may be larger than the image
      std::min(shape.kernel, shape.height) * std::min(shape.kernel, shape.width));
  for (int64_t row = 0; row < shape.out_height; ++row) {
    for (int64_t column = 0; column < shape.out_width; ++column) {
      const Window window(shape, row, column);
      int64_t* receiver = receivers.data();
      for (int64_t h = window.top; h < window.bottom; ++h)
        for (int64_t w = window.left; w < window.right; ++w)
          *receiver++ = window.first_alike(keys, shape.width, h, w) * shape.channels;
      const int64_t out = (row * shape.out_width + column) * shape.channels;
      for (int64_t c = begin; c < end; c += L::kStep) {
        const int64_t count = std::min(L::kStep, end - c);
        const auto largest = L::load(y + out + c, count);
        auto left_to_give = L::load(grad_y + out + c, count);
        receiver = receivers.data();
        for (int64_t h = window.top; h < window.bottom; ++h) {
          for (int64_t w = window.left; w < window.right; ++w) {
            const auto value = L::load(x + (h * shape.width + w) * shape.channels + c, count);
            feature_t* to = grad_x + *receiver++ + c;
            auto sum = L::load(to, count);
            for (int v = 0; v < L::kVecs; ++v) {
              const auto is_largest = (value[v] == largest[v]) | (value[v] != value[v]);
              sum[v] = sum[v] + L::Vec::blendv(zero[v], left_to_give[v], is_largest);
              left_to_give[v] = L::Vec::blendv(left_to_give[v], zero[v], is_largest);
            }
            L::store(to, sum, count);
          }
        }
      }
    }
  }
}

#define INSTANTIATE(feature_t)                                                                     \
  template void max_pool_row<feature_t>(const feature_t*, feature_t*, const PoolShape&, int64_t);  \
  template void max_pool_backward<feature_t>(const feature_t*, const feature_t*, const feature_t*, \
                                             const int64_t*, feature_t*, const PoolShape&,         \
                                             int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::Half)
INSTANTIATE(c10::BFloat16)
#undef INSTANTIATE

}  // namespace lpips_fast
