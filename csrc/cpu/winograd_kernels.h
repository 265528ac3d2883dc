// Winograd's convolution of channels-last images (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", CVPR 2016), with weights of 3x3, F(4x4, 3x3), or 5x5, F(4x4,
// 5x5): 36 or 64 multiplications a channel for 16 outputs, where the direct sum takes 144 or 400.
//
//   y = A^T [ (G g G^T) . (B^T d B) ] A      d: n x n of the image, g: weights, y: 4x4 results
//
// with n = 6 or 8. The sum over input channels between the brackets is a matrix product of its own
// for each of the n^2 elements, (tiles x C_in) (C_in x C_out). The points of the interpolation are
// 0, infinity and +-5/8, +-3/2 (n = 6) or +-1/2, +-1, +-2 (n = 8), found by trying: the usual +-1,
// +-2 and +-1, +-2, +-3 round twice as much and more, and 1 of the points would make sums of equal
// numbers exact at the price of twice the rounding elsewhere. All constants of the transforms B and
// A are exact in float32.
//
// Nearly all of the rounding is that of the sum over channels, so it runs in short chains: 32
// channels for 3x3 weights, 16 for 5x5. On the trunks' own features the error is then 1e-7 to 2e-7
// of the result's norm for 3x3 weights and 5e-7 for 5x5; that of a direct sum in one chain is 3e-7
// to 5e-7 and 6e-7. Longer runs round two to three times as much, which a gradient can bear: its
// are four times as long, for less time.
//
// Images may be float32, bfloat16 or float16: these are widened as they are read and rounded as
// they are written, and everything between is float32, weights too.
//
// Memory: a block of tiles goes through three phases (B^T d B, products, A^T m A) with its n^2
// (C_in + C_out) floats a tile in a cache; the transformed weights, 36 for each 9 or 64 for each
// 25, are read once a block. winograd_cpu.cpp divides the work.
//
// Outliers: in the transforms, a number that is much larger than its neighbours leaves its
// rounding, and a NaN itself, in all results of its tile, where a direct sum has it only where the
// kernel meets it. So numbers beyond a bound are taken for zero, and what the kernel makes of them
// is added directly: always the same sum, whose second part is empty for what images and layers
// hold.
//
// Every element of a product is added up along C_in in one order. So the result at a position
// depends on that position's neighbourhood and its place in its tile alone, to the bit: not on the
// batch, the block or the number of threads.
#pragma once

#include <cstdint>

#include "convolution_epilogue.h"

namespace lpips_fast {

constexpr int64_t kTileOut = 4;  // results of a tile, a side

// Inputs of a tile, a side.
constexpr int64_t winograd_tile_in(int64_t kernel) { return kTileOut + kernel - 1; }

// Of a transformed tile.
constexpr int64_t winograd_elements(int64_t kernel) {
  return winograd_tile_in(kernel) * winograd_tile_in(kernel);
}

// A panel is the columns of a product that one pass over its rows computes: two vectors.
int64_t winograd_panel_width();

// The convolution of an image (H, W, C) with borders of zeros.
//
// A stride of s is one of 1 over blocks of s x s positions, whose channels are the block's
// (space-to-depth): a block is s rows of s C numbers, each of which must be dense in memory. So
// AlexNet's first layer, 11x11 of stride 4, is a 3x3 convolution of 48 channels, a fifth of whose
// weights are zero.
struct WinogradImage {
  int64_t height, width, out_channels;  // of the results
  int64_t in_height, in_width, in_channels;
  int64_t stride;
  int64_t padding;  // rows and columns of zeros before the first
  int64_t kernel;   // 3 or 5, of blocks
  int64_t extent;   // of the kernel in positions: of the last blocks a part may be left out

  int64_t row_of_block() const { return stride * in_channels; }
  int64_t depth() const { return stride * row_of_block(); }  // channels of a block
  int64_t elements() const { return winograd_elements(kernel); }
  int64_t tile_rows() const { return (height + kTileOut - 1) / kTileOut; }
  int64_t tile_columns() const { return (width + kTileOut - 1) / kTileOut; }
  int64_t tiles() const { return tile_rows() * tile_columns(); }
};

// G g G^T in float64, rounded once. `weight` is (kernel, kernel) with strides; `to[e * stride]` for
// e < winograd_elements(kernel).
void winograd_transform_weight(const float* weight, int64_t kernel, int64_t stride_h,
                               int64_t stride_w, float* to, int64_t stride);

// B^T d B of one tile of image n, for all channels of its blocks: to[e * stride + c]. Outside the
// image is zero, and so are outliers, where the tile has any.
template <typename scalar_t>
void winograd_transform_input(const Positions<const scalar_t>& images, int64_t n,
                              const WinogradImage& shape, int64_t tile, bool has_outliers,
                              float* to, int64_t stride);

// Beyond are outliers. Images have 2.7 at most, the trunks' layers 30 to 810 (AlexNet 100, VGG16
// 180, SqueezeNet 810 in its last).
constexpr float kOutlierBound = 1024;

// Whether `count` numbers hold an outlier or a NaN.
template <typename scalar_t>
bool winograd_has_outliers(const scalar_t* numbers, int64_t count);

// What the kernel makes of a tile's outliers: adds to sums[(4 i + j) * columns + c], in place i, j
// of the tile. `weights` are the plain ones, (kernel^2, panels, depth, panel width).
template <typename scalar_t>
void winograd_add_outliers(const Positions<const scalar_t>& images, int64_t n,
                           const WinogradImage& shape, int64_t tile, const float* weights,
                           int64_t columns, float* sums);

// How many channels a chain of a sum adds at most: rounding grows with its length.
constexpr int64_t winograd_run(int64_t kernel, bool precise) {
  return (kernel == 3 ? 32 : 16) * (precise ? 1 : 4);
}

// product[r * product_stride + j] = sum_k rows[r * depth + k] * panel[k * width + j], j < width, as
// the sum of chains of at most `run`.
void winograd_multiply_panel(const float* rows, const float* panel, float* product, int64_t count,
                             int64_t depth, int64_t run, int64_t product_stride);

// A^T m A of one tile: m[e * stride + c] into the results of image n. `outliers`: what
// winograd_add_outliers made of the tile, or null; as many columns.
template <typename scalar_t>
void winograd_transform_output(const float* m, int64_t stride, const float* outliers,
                               int64_t columns, const WinogradImage& shape, int64_t tile,
                               const ConvolutionEpilogue<scalar_t>& epilogue,
                               const Positions<scalar_t>& results, int64_t n);

}  // namespace lpips_fast
