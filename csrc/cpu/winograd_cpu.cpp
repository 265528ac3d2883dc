// Torch's side of Winograd's convolution: checks, packing, work division, registration.
#include <algorithm>
#include <cstdint>
#include <optional>

#include "../stable_abi.h"
#include "winograd_kernels.h"

namespace lpips_fast {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// How the work is divided. Where there are many tiles, every thread takes blocks of its own through
// all three phases, in its L2 cache, and threads meet once, at the end: on a machine that does
// other work too, each meeting waits for the thread that was put to sleep. A block reads all the
// weights, which pays while these stay in the L3 cache.
constexpr int64_t kOwnBlockFloats = 80 * 1024;
constexpr int64_t kMinimumOwnTiles = 12, kMaximumOwnTiles = 48;  // whole rows of products
constexpr int64_t kOwnBlocksPerThread = 4;
constexpr int64_t kOwnWeightFloats = 5 * 512 * 1024;

// Else all threads share a block, phase by phase. It may take as much as an L3 cache holds beside
// the weights. More tiles share one read of the weights; beyond some hundreds that is gained.
constexpr int64_t kBlockFloats = 5 * 1024 * 1024;
constexpr int64_t kMinimumTiles = 48, kMaximumTiles = 192;
constexpr int64_t kFloatsPerTask = 16 * 1024;

int64_t padded(int64_t channels) {
  const int64_t width = winograd_panel_width();
  return (channels + width - 1) / width * width;
}

Tensor empty(std::initializer_list<int64_t> shape, const Tensor& like) {
  return torch::stable::empty(shape, ScalarType::Float, std::nullopt, like.device());
}

// (C_out, C_in, 3, 3) or (C_out, C_in, 5, 5) to (36 or 64, panels, C_in, width): as the products
// read it, columns without a channel zero.
Tensor winograd_pack(Tensor weight) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == weight.size(3) &&
          (weight.size(2) == 3 || weight.size(2) == 5) && weight.scalar_type() == ScalarType::Float,
      "winograd_pack takes a float32 weight (C_out, C_in, 3, 3) or (C_out, C_in, 5, 5)");
  const int64_t out_channels = weight.size(0), in_channels = weight.size(1);
  const int64_t width = winograd_panel_width(), panels = padded(out_channels) / width;
  const int64_t elements = winograd_elements(weight.size(2));
  const Tensor packed = empty({elements, panels, in_channels, width}, weight);
  const auto* from = static_cast<const float*>(weight.const_data_ptr());
  auto* to = static_cast<float*>(packed.mutable_data_ptr());
  const int64_t element_stride = panels * in_channels * width;
  parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      for (int64_t k = 0; k < in_channels; ++k) {
        for (int64_t j = 0; j < width; ++j) {
          const int64_t o = panel * width + j;
          float* target = to + (panel * in_channels + k) * width + j;
          if (o < out_channels) {
            winograd_transform_weight(from + o * weight.stride(0) + k * weight.stride(1),
                                      weight.size(2), weight.stride(2), weight.stride(3), target,
                                      element_stride);
          } else {
            for (int64_t e = 0; e < elements; ++e) target[e * element_stride] = 0;
          }
        }
      }
    }
  });
  return packed;
}

const float* pointer_to(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// From one position's channels to the next one's, in channels-last order.
int64_t position_stride(const Tensor& x) {
  return x.size(3) > 1   ? x.stride(3)
         : x.size(2) > 1 ? x.stride(2)
         : x.size(0) > 1 ? x.stride(0)
                         : x.size(1);
}

// Channels-last, densely or as some of the channels of such images.
bool is_channels_last(const Tensor& x) {
  const int64_t stride = position_stride(x);
  return (x.size(1) == 1 || x.stride(1) == 1) && stride >= x.size(1) &&
         (x.size(2) == 1 || x.stride(2) == x.size(3) * stride) &&
         (x.size(0) == 1 || x.stride(0) == x.size(2) * x.size(3) * stride);
}

// An argument with an element for each of the result's, in the result's order.
std::optional<Tensor> like_the_result(const std::optional<Tensor>& t, const Tensor& y) {
  if (!t) return t;
  STD_TORCH_CHECK(t->dim() == 4 && t->size(0) == y.size(0) && t->size(1) == y.size(1) &&
                      t->size(2) == y.size(2) && t->size(3) == y.size(3) &&
                      t->scalar_type() == ScalarType::Float,
                  "mask and add must have the shape and dtype of the result");
  return torch::stable::contiguous(*t, MemoryFormat::ChannelsLast);
}

// Some tiles, from `begin` on, and what becomes of them between the phases.
struct Block {
  int64_t begin, count;
  float* inputs;    // (elements, count, depth)
  float* products;  // (elements, count, columns)
};

// The three phases of a batch of images, of which any part can be done on its own.
struct Convolution {
  WinogradImage image;
  int64_t columns;  // of a product: channels, in whole panels
  const float* images;
  const float* weights;
  WinogradEpilogue epilogue;
  float* results;

  int64_t floats_per_tile() const { return image.elements() * (image.depth() + columns); }
  int64_t own_block() const {
    constexpr int64_t step = kMinimumOwnTiles;
    return std::clamp(kOwnBlockFloats / floats_per_tile(), step, kMaximumOwnTiles) / step * step;
  }
  int64_t panels() const { return columns / winograd_panel_width(); }
  int64_t products() const { return image.elements() * panels(); }

  Block block(int64_t begin, int64_t count, float* scratch) const {
    return {begin, count, scratch, scratch + image.elements() * count * image.depth()};
  }

  void transform_inputs(const Block& block, int64_t first, int64_t last) const {
    const int64_t in_size = image.in_height * image.in_width * image.in_stride;
    for (int64_t t = first; t < last; ++t) {
      const int64_t n = (block.begin + t) / image.tiles(), tile = (block.begin + t) % image.tiles();
      winograd_transform_input(images + n * in_size, image, tile, block.inputs + t * image.depth(),
                               block.count * image.depth());
    }
  }

  void multiply(const Block& block, int64_t first, int64_t last) const {
    const int64_t depth = image.depth(), width = winograd_panel_width();
    for (int64_t k = first; k < last; ++k) {
      const int64_t element = k / panels(), panel = k % panels();
      winograd_multiply_panel(block.inputs + element * block.count * depth,
                              weights + k * depth * width,
                              block.products + element * block.count * columns + panel * width,
                              block.count, depth, columns);
    }
  }

  void transform_outputs(const Block& block, int64_t first, int64_t last) const {
    const int64_t out_size = image.height * image.width * image.out_channels;
    for (int64_t t = first; t < last; ++t) {
      const int64_t n = (block.begin + t) / image.tiles(), tile = (block.begin + t) % image.tiles();
      WinogradEpilogue of_image = epilogue;
      if (epilogue.add) of_image.add += n * out_size;
      if (epilogue.mask) of_image.mask += n * out_size;
      winograd_transform_output(block.products + t * columns, block.count * columns, image, tile,
                                of_image, results + n * out_size);
    }
  }
};

// Every thread its own blocks of `size` tiles.
void convolve_apart(const Convolution& convolution, int64_t tiles, int64_t size,
                    const Tensor& like) {
  parallel_for(0, (tiles + size - 1) / size, 1, [&](int64_t first, int64_t last) {
    const Tensor scratch = empty({size * convolution.floats_per_tile()}, like);
    for (int64_t k = first; k < last; ++k) {
      const Block block = convolution.block(k * size, std::min(size, tiles - k * size),
                                            static_cast<float*>(scratch.mutable_data_ptr()));
      convolution.transform_inputs(block, 0, block.count);
      convolution.multiply(block, 0, convolution.products());
      convolution.transform_outputs(block, 0, block.count);
    }
  });
}

// All threads one block after the other, the last of them perhaps smaller.
void convolve_together(const Convolution& convolution, int64_t tiles, const Tensor& like) {
  const int64_t per_tile = convolution.floats_per_tile();
  const int64_t limit = std::clamp(kBlockFloats / per_tile, kMinimumTiles, kMaximumTiles);
  const int64_t blocks = (tiles + limit - 1) / limit, size = (tiles + blocks - 1) / blocks;
  const Tensor scratch = empty({size * per_tile}, like);
  const auto grain = [](int64_t floats) { return std::max<int64_t>(1, kFloatsPerTask / floats); };
  for (int64_t begin = 0; begin < tiles; begin += size) {
    const Block block = convolution.block(begin, std::min(size, tiles - begin),
                                          static_cast<float*>(scratch.mutable_data_ptr()));
    parallel_for(0, block.count, grain(per_tile), [&](int64_t first, int64_t last) {
      convolution.transform_inputs(block, first, last);
    });
    parallel_for(0, convolution.products(), grain(block.count * convolution.image.depth()),
                 [&](int64_t first, int64_t last) { convolution.multiply(block, first, last); });
    parallel_for(0, block.count, grain(per_tile), [&](int64_t first, int64_t last) {
      convolution.transform_outputs(block, first, last);
    });
  }
}

Tensor winograd_conv2d(Tensor x, Tensor packed, std::optional<Tensor> bias, bool relu,
                       std::optional<Tensor> mask, int64_t out_channels, int64_t kernel,
                       int64_t stride, int64_t padding, std::optional<Tensor> add) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float,
                  "winograd_conv2d takes float32 images (N, C, H, W)");
  STD_TORCH_CHECK(stride >= 1 && padding >= 0, "expected a stride of at least 1 and a padding");
  const int64_t blocks_of_kernel = (kernel + stride - 1) / stride;
  STD_TORCH_CHECK(blocks_of_kernel == 3 || blocks_of_kernel == 5,
                  "the kernel must be 3 or 5 times the stride, rounded up, got ", kernel);
  const int64_t height = (x.size(2) + 2 * padding - kernel) / stride + 1;
  const int64_t columns = (x.size(3) + 2 * padding - kernel) / stride + 1;
  STD_TORCH_CHECK(x.size(2) + 2 * padding >= kernel && x.size(3) + 2 * padding >= kernel,
                  "images of ", x.size(2), "x", x.size(3), " are smaller than the kernel");
  const int64_t width = winograd_panel_width();
  const int64_t product_channels = padded(out_channels), panels = product_channels / width;
  STD_TORCH_CHECK(packed.dim() == 4 && packed.size(0) == winograd_elements(blocks_of_kernel) &&
                      packed.size(1) == panels && packed.size(2) == stride * stride * x.size(1) &&
                      packed.size(3) == width && packed.is_contiguous() &&
                      packed.scalar_type() == ScalarType::Float,
                  "the weight was not packed for blocks of ", stride, "x", stride, "x", x.size(1),
                  " to ", out_channels, " channels");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == out_channels &&
                            bias->is_contiguous() && bias->scalar_type() == ScalarType::Float),
                  "expected a contiguous float32 bias of ", out_channels, " channels");
  if (!is_channels_last(x) || (stride > 1 && position_stride(x) != x.size(1)))
    x = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  const Tensor y =
      torch::stable::empty({x.size(0), out_channels, height, columns}, ScalarType::Float,
                           std::nullopt, x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  mask = like_the_result(mask, y);
  add = like_the_result(add, y);
  const WinogradImage image{height,    columns,         out_channels,       x.size(2),
                            x.size(3), x.size(1),       position_stride(x), stride,
                            padding,   blocks_of_kernel};
  const int64_t in_tiles = image.tiles(), all_tiles = x.size(0) * in_tiles;
  if (all_tiles == 0) return y;
  const Convolution convolution{image,
                                padded(out_channels),
                                static_cast<const float*>(x.const_data_ptr()),
                                static_cast<const float*>(packed.const_data_ptr()),
                                {pointer_to(bias), pointer_to(add), relu, pointer_to(mask)},
                                static_cast<float*>(y.mutable_data_ptr())};
  const bool fits = packed.numel() <= kOwnWeightFloats;
  const int64_t own = convolution.own_block();
  if (fits && all_tiles >= own * kOwnBlocksPerThread * torch::stable::get_num_threads()) {
    convolve_apart(convolution, all_tiles, own, x);
  } else {
    convolve_together(convolution, all_tiles, x);
  }
  return y;
}

}  // namespace
}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("winograd_pack", TORCH_BOX(&lpips_fast::winograd_pack));
  m.impl("winograd_conv2d", TORCH_BOX(&lpips_fast::winograd_conv2d));
}
