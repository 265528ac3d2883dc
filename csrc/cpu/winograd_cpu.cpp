// Torch's side of Winograd's convolution: checks, packing, work division, registration.
#include "winograd_cpu.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../convolution.h"
#include "channels_last_tensors.h"
#include "parallel.h"

namespace lpips_fast {
namespace {

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

int64_t in_whole_panels(int64_t channels) {
  const int64_t width = winograd_panel_width();
  return (channels + width - 1) / width * width;
}

std::array<int64_t, 4> packed_shape(int64_t kernel, int64_t in_channels, int64_t out_channels) {
  const int64_t width = winograd_panel_width();
  return {winograd_elements(kernel) + kernel * kernel, in_whole_panels(out_channels) / width,
          in_channels, width};
}

// (C_out, C_in, 3, 3) or (C_out, C_in, 5, 5) to (36 + 9 or 64 + 25, panels, C_in, width): as the
// products read it, and behind that the plain weights, which outliers meet. Columns without a
// channel are zero.
Tensor winograd_pack(Tensor weight) {
  check_weight_to_pack("winograd_pack", weight);
  LPIPS_FAST_CHECK(weight.size(2) == 3 || weight.size(2) == 5,
                   "winograd_pack takes a float32 weight (C_out, C_in, 3, 3) or (C_out, C_in, 5, "
                   "5), got ",
                   shape_of(weight));
  const int64_t out_channels = weight.size(0), in_channels = weight.size(1);
  const int64_t kernel = weight.size(2), elements = winograd_elements(kernel);
  const auto shape = packed_shape(kernel, in_channels, out_channels);
  const int64_t planes = shape[0], panels = shape[1], width = shape[3];
  const Tensor packed = empty_floats({planes, panels, in_channels, width});
  if (packed.numel() == 0) return packed;
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
            const float* plain = from + o * weight.stride(0) + k * weight.stride(1);
            winograd_transform_weight(plain, kernel, weight.stride(2), weight.stride(3), target,
                                      element_stride);
            target += elements * element_stride;
            for (int64_t t = 0; t < kernel * kernel; ++t)
              target[t * element_stride] =
                  plain[t / kernel * weight.stride(2) + t % kernel * weight.stride(3)];
          } else {
            for (int64_t e = 0; e < planes; ++e) target[e * element_stride] = 0;
          }
        }
      }
    }
  });
  return packed;
}

// Some tiles, from `begin` on, and what becomes of them between the phases.
struct Block {
  int64_t begin, count;
  float* inputs;    // (elements, count, depth)
  float* products;  // (elements, count, columns)
};

// The three phases, of which any part can be done on its own.
template <typename scalar_t>
struct Phases {
  const WinogradConvolution<scalar_t>& convolution;
  int64_t columns;                // of a product: channels, in whole panels
  std::vector<uint8_t> outliers;  // whether a row of an image holds any; empty: nobody asks

  Phases(const WinogradConvolution<scalar_t>& convolution, int64_t batch)
      : convolution(convolution), columns(in_whole_panels(convolution.image.out_channels)) {
    if (convolution.precise) find_outliers(batch);
  }

  const WinogradImage& image() const { return convolution.image; }
  int64_t floats_per_tile() const { return image().elements() * (image().depth() + columns); }
  int64_t panels() const { return columns / winograd_panel_width(); }
  int64_t products() const { return image().elements() * panels(); }

  Block block(int64_t begin, int64_t count, const Tensor& scratch) const {
    auto* floats = static_cast<float*>(scratch.mutable_data_ptr());
    return {begin, count, floats, floats + image().elements() * count * image().depth()};
  }

  // Reads the images once, which lie in a cache or will.
  void find_outliers(int64_t batch) {
    const int64_t height = image().in_height, width = image().in_width;
    const int64_t channels = image().in_channels, column = convolution.images.column;
    outliers = zeros<uint8_t>(batch * height);
    parallel_for(0, batch * height, std::max<int64_t>(1, kFloatsPerTask / (width * channels)),
                 [&](int64_t first, int64_t last) {
                   for (int64_t row = first; row < last; ++row) {
                     const scalar_t* from = convolution.images.at(row / height, row % height, 0);
                     const bool is_dense = column == channels;
                     const int64_t runs = is_dense ? 1 : width;
                     bool found = false;
                     for (int64_t k = 0; k < runs; ++k)
                       found |= winograd_has_outliers(from + k * column,
                                                      is_dense ? width * channels : channels);
                     outliers[row] = found;
                   }
                 });
  }

  bool has_outliers(int64_t n, int64_t tile) const {
    if (outliers.empty()) return false;
    const int64_t top = tile / image().tile_columns() * kTileOut * image().stride;
    const int64_t rows = winograd_tile_in(image().kernel) * image().stride;
    const int64_t first = std::max<int64_t>(0, top - image().padding);
    const int64_t last = std::min(image().in_height, top - image().padding + rows);
    const uint8_t* of_image = outliers.data() + n * image().in_height;
    return std::any_of(of_image + first, of_image + std::max(first, last),
                       [](uint8_t found) { return found != 0; });
  }

  void transform_inputs(const Block& block, int64_t first, int64_t last) const {
    const int64_t tiles = image().tiles(), depth = image().depth();
    for (int64_t t = first; t < last; ++t) {
      const int64_t n = (block.begin + t) / tiles, tile = (block.begin + t) % tiles;
      winograd_transform_input(convolution.images, n, image(), tile, has_outliers(n, tile),
                               block.inputs + t * depth, block.count * depth);
    }
  }

  void multiply(const Block& block, int64_t first, int64_t last) const {
    const int64_t depth = image().depth(), width = winograd_panel_width();
    const int64_t run = winograd_run(image().kernel, convolution.precise);
    for (int64_t k = first; k < last; ++k) {
      const int64_t element = k / panels(), panel = k % panels();
      winograd_multiply_panel(block.inputs + element * block.count * depth,
                              convolution.weights + k * depth * width,
                              block.products + element * block.count * columns + panel * width,
                              block.count, depth, run, columns);
    }
  }

  void transform_outputs(const Block& block, int64_t first, int64_t last) const {
    const int64_t tiles = image().tiles();
    const float* plain = convolution.weights + image().elements() * columns * image().depth();
    for (int64_t t = first; t < last; ++t) {
      const int64_t n = (block.begin + t) / tiles, tile = (block.begin + t) % tiles;
      std::vector<float> sums;
      if (has_outliers(n, tile)) {
        sums = zeros<float>(kTileOut * kTileOut * columns);
        winograd_add_outliers(convolution.images, n, image(), tile, plain, columns, sums.data());
      }
      winograd_transform_output(block.products + t * columns, block.count * columns,
                                sums.empty() ? nullptr : sums.data(), columns, image(), tile,
                                convolution.epilogue, convolution.results, n);
    }
  }
};

// Every thread its own blocks of `size` tiles.
template <typename scalar_t>
void convolve_apart(const Phases<scalar_t>& phases, int64_t tiles, int64_t size) {
  parallel_for(0, (tiles + size - 1) / size, 1, [&](int64_t first, int64_t last) {
    const Tensor scratch = empty_floats({size * phases.floats_per_tile()});
    for (int64_t k = first; k < last; ++k) {
      const Block block = phases.block(k * size, std::min(size, tiles - k * size), scratch);
      phases.transform_inputs(block, 0, block.count);
      phases.multiply(block, 0, phases.products());
      phases.transform_outputs(block, 0, block.count);
    }
  });
}

// All threads one block after the other, the last of them perhaps smaller.
template <typename scalar_t>
void convolve_together(const Phases<scalar_t>& phases, int64_t tiles) {
  const int64_t per_tile = phases.floats_per_tile();
  const int64_t limit = std::clamp(kBlockFloats / per_tile, kMinimumTiles, kMaximumTiles);
  const int64_t blocks = (tiles + limit - 1) / limit, size = (tiles + blocks - 1) / blocks;
  const Tensor scratch = empty_floats({size * per_tile});
  const auto grain = [](int64_t floats) { return std::max<int64_t>(1, kFloatsPerTask / floats); };
  for (int64_t begin = 0; begin < tiles; begin += size) {
    const Block block = phases.block(begin, std::min(size, tiles - begin), scratch);
    parallel_for(0, block.count, grain(per_tile),
                 [&](int64_t first, int64_t last) { phases.transform_inputs(block, first, last); });
    parallel_for(0, phases.products(), grain(block.count * phases.image().depth()),
                 [&](int64_t first, int64_t last) { phases.multiply(block, first, last); });
    parallel_for(0, block.count, grain(per_tile), [&](int64_t first, int64_t last) {
      phases.transform_outputs(block, first, last);
    });
  }
}

template <typename scalar_t>
Positions<const scalar_t> positions_of_optional(std::optional<Tensor>& t) {
  if (!t) return {};
  t = with_dense_channels(*t);
  return positions_of<scalar_t>(*t);
}

Tensor winograd_conv2d(Tensor x, Tensor packed, std::optional<Tensor> bias, bool relu,
                       std::optional<Tensor> mask, int64_t out_channels, int64_t kernel,
                       int64_t stride, int64_t padding, std::optional<Tensor> add, bool precise) {
  Operands(Backend::kCPU)
      .check("x", x)
      .check("packed", packed)
      .check("bias", bias)
      .check("mask", mask)
      .check("add", add);
  LPIPS_FAST_CHECK(
      x.dim() == 4 && is_feature_dtype(x.scalar_type()) && x.scalar_type() != ScalarType::Double,
      "winograd_conv2d takes float32, bfloat16 or float16 images (N, C, H, W), got ",
      description_of(x));
  const ConvolutionGeometry geometry{out_channels, kernel, stride, padding};
  check_convolution("winograd_conv2d", x, geometry);
  const int64_t blocks_of_kernel = (kernel - 1) / stride + 1;
  LPIPS_FAST_CHECK(blocks_of_kernel == 3 || blocks_of_kernel == 5,
                   "the kernel must be 3 or 5 times the stride, rounded up, got ", kernel,
                   " for a stride of ", stride);
  const float* weights = winograd_packed("the weight", packed, blocks_of_kernel,
                                         product({stride, stride, x.size(1)}), out_channels);
  check_bias(bias, out_channels);
  const int64_t height = geometry.results(x.size(2)), width = geometry.results(x.size(3));
  for (const auto& [name, t] : {std::pair("mask", &mask), std::pair("add", &add)})
    check_like_result(name, *t, {x.size(0), out_channels, height, width}, x.scalar_type());
  x = stride > 1 && column_stride(x) != x.size(1) ? dense(x, MemoryFormat::ChannelsLast)
                                                  : with_dense_channels(x);
  const Tensor y = empty_images(x.size(0), out_channels, height, width, x.scalar_type());
  if (y.numel() == 0) return y;
  const auto convolve = [&](auto scalar) {
    using scalar_t = decltype(scalar);
    winograd_convolve<scalar_t>({.image = {.height = height,
                                           .width = width,
                                           .out_channels = out_channels,
                                           .in_height = x.size(2),
                                           .in_width = x.size(3),
                                           .in_channels = x.size(1),
                                           .stride = stride,
                                           .padding = padding,
                                           .kernel = blocks_of_kernel,
                                           .extent = kernel},
                                 .images = positions_of<scalar_t>(x),
                                 .weights = weights,
                                 .epilogue = {.bias = pointer_to(bias),
                                              .add = positions_of_optional<scalar_t>(add),
                                              .relu = relu,
                                              .mask = positions_of_optional<scalar_t>(mask)},
                                 .results = positions_to<scalar_t>(y),
                                 .precise = precise},
                                x.size(0));
  };
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      convolve(c10::BFloat16{});
      break;
    case ScalarType::Half:
      convolve(c10::Half{});
      break;
    default:
      convolve(float{});
  }
  return y;
}

}  // namespace

const float* winograd_packed(const char* name, const Tensor& packed, int64_t kernel,
                             int64_t in_channels, int64_t out_channels) {
  const auto shape = packed_shape(kernel, in_channels, out_channels);
  check_packed(name, packed, {shape[0], shape[1], shape[2], shape[3]});
  return static_cast<const float*>(packed.const_data_ptr());
}

template <typename scalar_t>
void winograd_convolve(const WinogradConvolution<scalar_t>& convolution, int64_t batch) {
  const WinogradImage& image = convolution.image;
  const int64_t tiles = batch * image.tiles();
  if (tiles == 0) return;
  const Phases<scalar_t> phases(convolution, batch);
  constexpr int64_t step = kMinimumOwnTiles;
  const int64_t size =
      std::clamp(kOwnBlockFloats / phases.floats_per_tile(), step, kMaximumOwnTiles) / step * step;
  const int64_t weights = image.elements() * image.depth() * phases.columns;
  const int64_t enough = size * kOwnBlocksPerThread * torch::stable::get_num_threads();
  if (weights <= kOwnWeightFloats && tiles >= enough) {
    convolve_apart(phases, tiles, size);
  } else {
    convolve_together(phases, tiles);
  }
}

}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("winograd_pack", TORCH_BOX(&lpips_fast::winograd_pack));
  m.impl("winograd_conv2d", TORCH_BOX(&lpips_fast::winograd_conv2d));
}
