// Winograd's convolution of channels-last images, float32 (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", CVPR 2016), with weights of 3x3, F(4x4, 3x3), or 5x5, F(2x2,
// 5x5): 36 multiplications a channel for 16 or 4 outputs, where the direct sum takes 144 or 100.
//
//   y = A^T [ (G g G^T) . (B^T d B) ] A      d: 6x6 of the image, g: weights, y: 4x4 or 2x2 results
//
// The sum over input channels between the brackets is a matrix product of its own for each of the
// 36 elements, (tiles x C_in) (C_in x C_out). The points of the interpolation are 0, +-5/8, +-3/2
// and infinity instead of the usual 0, +-1, +-2: products are nearer to each other in size, and the
// rounding error is half as large (about 9e-7 of the result's norm; the direct sum: 2e-7). All
// constants of the transforms B and A are exact in float32.
//
// Memory: a block of tiles goes through three phases with its 36 (C_in + C_out) floats a tile in
// the L3 cache; the transformed weights, 36 for each 9 or 25, are read once a block.
//
// Every element of a product is one chain of fused multiply-adds along C_in. So the result at a
// position depends on that position's neighbourhood alone, to the bit: not on the batch, the
// block, the tile's place in it or the number of threads.
#pragma once

#include <cstdint>

namespace lpips_fast {

constexpr int64_t kTileIn = 6;     // inputs of a tile, a side
constexpr int64_t kElements = 36;  // of a transformed tile

// A panel is the columns of a product that one pass over its rows computes: two vectors.
int64_t winograd_panel_width();

// One image (H, W, C), convolved with borders of zeros to the same size.
struct WinogradImage {
  int64_t height, width, in_channels, out_channels;
  int64_t in_stride;  // from one position's channels to the next one's; results lie densely
  int64_t kernel;     // 3 or 5

  int64_t tile_out() const { return kTileIn + 1 - kernel; }
  int64_t tile_rows() const { return (height + tile_out() - 1) / tile_out(); }
  int64_t tile_columns() const { return (width + tile_out() - 1) / tile_out(); }
  int64_t tiles() const { return tile_rows() * tile_columns(); }
};

// G g G^T in float64, rounded once. `weight` is (kernel, kernel) with strides; `to[e * stride]` for
// e < 36.
void winograd_transform_weight(const float* weight, int64_t kernel, int64_t stride_h,
                               int64_t stride_w, float* to, int64_t stride);

// B^T d B of one tile of `image`, for all channels: to[e * stride + c]. Outside the image is zero.
void winograd_transform_input(const float* image, const WinogradImage& shape, int64_t tile,
                              float* to, int64_t stride);

// product[r * product_stride + j] = sum_k rows[r * depth + k] * panel[k * width + j], j < width.
void winograd_multiply_panel(const float* rows, const float* panel, float* product, int64_t count,
                             int64_t depth, int64_t product_stride);

// What becomes of a result before it is written: plus `bias` (C_out,) and `add`, then max(., 0),
// which keeps NaN, and 0 wherever `mask` is 0 or below. Images `add` and `mask` lie as the result
// does. Each is left out where null or false.
struct WinogradEpilogue {
  const float* bias;
  const float* add;
  bool relu;
  const float* mask;
};

// A^T m A of one tile: m[e * stride + c] into `out`, an image (H, W, C_out).
void winograd_transform_output(const float* m, int64_t stride, const WinogradImage& shape,
                               int64_t tile, const WinogradEpilogue& epilogue, float* out);

}  // namespace lpips_fast
