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
};

// A window's positions, row by row, as offsets of their channels in an image: where each lies, and
// which position takes its gradient, or kNone where that is in no row that is asked for.
class WindowPositions {
 public:
  static constexpr int64_t kNone = -1;

  explicit WindowPositions(const PoolShape& shape)  // a kernel may be larger than the image
      : shape_(shape),
        from_(std::min(shape.kernel, shape.height) * std::min(shape.kernel, shape.width)),
        to_(from_.size()),
        keys_(from_.size()) {}

  // Those of `window`; its rows from `top` to `bottom` are asked for. Without keys each position
  // takes its own gradient, with keys the first one that has the same.
  void look_at(const Window& window, const int64_t* keys, int64_t top, int64_t bottom) {
    count_ = 0;
    for (int64_t h = window.top; h < window.bottom; ++h) {
      for (int64_t w = window.left; w < window.right; ++w, ++count_) {
        const int64_t position = h * shape_.width + w;
        from_[count_] = position * shape_.channels;
        to_[count_] = h >= top && h < bottom ? from_[count_] : kNone;
        if (keys != nullptr) keys_[count_] = keys[position];
      }
    }
    if (keys != nullptr && has_ties()) give_to_first();
  }

  int64_t count() const { return count_; }
  int64_t from(int64_t i) const { return from_[i]; }
  int64_t to(int64_t i) const { return to_[i]; }

 private:
  // Ties are rare: asked for all pairs at once, without a branch.
  bool has_ties() const {
    bool found = false;
    for (int64_t i = 1; i < count_; ++i)
      for (int64_t j = 0; j < i; ++j) found |= keys_[i] == keys_[j];
    return found;
  }

  void give_to_first() {
    for (int64_t i = count_ - 1; i > 0; --i)
      to_[i] = to_[std::find(keys_.begin(), keys_.begin() + i, keys_[i]) - keys_.begin()];
  }

  const PoolShape& shape_;
  int64_t count_ = 0;
  std::vector<int64_t> from_, to_, keys_;
};

// Gives the gradients of channels [begin, end) of one window, at `grad_y` and `y`, to its
// positions.
template <typename feature_t>
void give_gradients(const feature_t* grad_y, const feature_t* x, const feature_t* y,
                    const WindowPositions& positions, feature_t* grad_x, int64_t begin,
                    int64_t end) {
  using L = Lanes<feature_t>;
  const auto zero = L::fill(0);
  for (int64_t c = begin; c < end; c += L::kStep) {
    const int64_t count = std::min(L::kStep, end - c);
    const auto largest = L::load(y + c, count);
    auto left_to_give = L::load(grad_y + c, count);
    for (int64_t i = 0; i < positions.count(); ++i) {
      const auto value = L::load(x + positions.from(i) + c, count);
      auto given = zero;
      for (int v = 0; v < L::kVecs; ++v) {
        const auto is_largest = (value[v] == largest[v]) | (value[v] != value[v]);
        given[v] = L::Vec::blendv(zero[v], left_to_give[v], is_largest);
        left_to_give[v] = L::Vec::blendv(left_to_give[v], zero[v], is_largest);
      }
      if (positions.to(i) == WindowPositions::kNone) continue;
      feature_t* to = grad_x + positions.to(i) + c;
      auto sum = L::load(to, count);
      for (int v = 0; v < L::kVecs; ++v) sum[v] = sum[v] + given[v];
      L::store(to, sum, count);
    }
  }
}

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
                       const int64_t* keys, int64_t groups, feature_t* grad_x,
                       const PoolShape& shape, int64_t top, int64_t bottom) {
  const int64_t per_group = shape.channels / groups;
  int64_t cleared = top;
  const auto clear_to = [&](int64_t row) {  // while they are about to be added to, in the cache
    const int64_t row_elements = shape.width * shape.channels;
    if (row <= cleared) return;
    std::fill(grad_x + cleared * row_elements, grad_x + row * row_elements, feature_t(0));
    cleared = row;
  };
  WindowPositions positions(shape);
  const int64_t first_row = top < shape.kernel ? 0 : (top - shape.kernel) / shape.stride + 1;
  const int64_t end_row = std::min((bottom - 1) / shape.stride + 1, shape.out_height);
  for (int64_t row = first_row; row < end_row; ++row) {
    clear_to(std::min(Window(shape, row, 0).bottom, bottom));
    for (int64_t column = 0; column < shape.out_width; ++column) {
      const Window window(shape, row, column);
      const int64_t out = (row * shape.out_width + column) * shape.channels;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t* of_group =
            keys == nullptr ? nullptr : keys + group * shape.height * shape.width;
        positions.look_at(window, of_group, top, bottom);
        give_gradients(grad_y + out, x, y + out, positions, grad_x, group * per_group,
                       (group + 1) * per_group);
      }
    }
  }
  clear_to(bottom);
}

#define INSTANTIATE(feature_t)                                                                     \
  template void max_pool_row<feature_t>(const feature_t*, feature_t*, const PoolShape&, int64_t);  \
  template void max_pool_backward<feature_t>(const feature_t*, const feature_t*, const feature_t*, \
                                             const int64_t*, int64_t, feature_t*,                  \
                                             const PoolShape&, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::Half)
INSTANTIATE(c10::BFloat16)
#undef INSTANTIATE

}  // namespace lpips_fast
