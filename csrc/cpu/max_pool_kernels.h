// Max-pooling of channels-last images without an index tensor: torch's own writes 8 bytes of index
// per output, four times a float32 output's share of memory traffic in training, twice in
// evaluation. The backward finds the maximum again by comparing the window with the pooled value.
#pragma once

#include <cstdint>

namespace lpips_fast {

// Square windows without padding or dilation; the last one may hang over the edge (ceil_mode).
struct PoolShape {
  int64_t channels, height, width, out_height, out_width, kernel, stride;
};

// One row of outputs of one image. `x` and `y` are that image, densely (H, W, C).
template <typename feature_t>
void max_pool_row(const feature_t* x, feature_t* y, const PoolShape& shape, int64_t out_row);

// The gradient of one image, for channels [begin, end) of all its positions. `grad_x` is written
// whole. Among equal values the first of the window, row by row, gets the gradient, as in torch.
template <typename feature_t>
void max_pool_backward(const feature_t* grad_y, const feature_t* x, const feature_t* y,
                       feature_t* grad_x, const PoolShape& shape, int64_t begin, int64_t end);

}  // namespace lpips_fast
