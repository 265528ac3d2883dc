// The loops of max-pooling on the CPU (csrc/max_pool.h has the contract): without an index tensor,
// which is four times a float32 output's share of memory traffic in training, twice in evaluation.
#pragma once

#include <cstdint>

#include "../pool_shape.h"

namespace lpips_fast {

// One row of outputs of one image. `x` and `y` are that image, densely (H, W, C).
template <typename feature_t>
void max_pool_row(const feature_t* x, feature_t* y, const PoolShape& shape, int64_t out_row);

// The gradient of one image, its rows [top, bottom) for all channels, which are written whole.
// Threads that share out an image's rows ask for the windows between two of them twice: adding is
// in the windows' order either way. `keys` (groups, H, W), or null: of positions with one key the
// first of a window gets the gradient.
template <typename feature_t>
void max_pool_backward(const feature_t* grad_y, const feature_t* x, const feature_t* y,
                       const int64_t* keys, int64_t groups, feature_t* grad_x,
                       const PoolShape& shape, int64_t top, int64_t bottom);

}  // namespace lpips_fast
