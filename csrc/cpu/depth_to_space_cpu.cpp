// Blocks of s x s positions back in their places: what a convolution of stride 1 over blocks gives
// as channels is the image of the convolution of stride s, or its gradient.
//
// Memory: reads and writes everything once, s C numbers at a time.
#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "channels_last_tensors.h"
#include "parallel.h"

namespace lpips_fast {
namespace {

constexpr int64_t kBytesPerTask = 64 * 1024;

// (N, s s C, H_b, W_b), channels in the order row of the block, column, C, to (N, C, H, W): the
// blocks' image without its first `padding` rows and columns, and zeros where it ends too soon.
Tensor depth_to_space(Tensor blocks, int64_t stride, int64_t padding, int64_t height,
                      int64_t width) {
  Operands(Backend::kCPU).check("blocks", blocks);
  const auto is_parameter = [](int64_t value, int64_t least) {
    return value >= least && value <= kMaxParameter;
  };
  LPIPS_FAST_CHECK(blocks.dim() == 4 && is_feature_dtype(blocks.scalar_type()) &&
                       is_parameter(stride, 1) && is_parameter(padding, 0) &&
                       is_parameter(height, 0) && is_parameter(width, 0) &&
                       blocks.size(1) % (stride * stride) == 0,
                   "depth_to_space takes blocks (N, stride * stride * C, H, W) of float32, "
                   "float64, float16 or bfloat16, and sizes, got ",
                   description_of(blocks), ", a stride of ", stride, ", a padding of ", padding,
                   " and an image of ", height, "x", width);
  blocks = dense(blocks, MemoryFormat::ChannelsLast);
  const int64_t batch = blocks.size(0), channels = blocks.size(1) / (stride * stride);
  const int64_t rows = blocks.size(2), columns = blocks.size(3);
  const Tensor image = empty_images(batch, channels, height, width, blocks.scalar_type());
  if (image.numel() == 0) return image;
  auto* to = static_cast<char*>(image.mutable_data_ptr());
  if (blocks.numel() == 0) {
    std::memset(to, 0, image.numel() * image.element_size());
    return image;
  }
  const int64_t position = channels * static_cast<int64_t>(blocks.element_size());
  const int64_t row_of_block = stride * position;
  const auto* from = static_cast<const char*>(blocks.const_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / (width * position));
  parallel_for(0, batch * height, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      char* out = to + row * width * position;
      const int64_t y = row % height + padding;
      int64_t x = 0;
      if (y < rows * stride) {
        const char* block_row =
            from +
            ((row / height * rows + y / stride) * columns * stride + y % stride) * row_of_block;
        while (x < width && x + padding < columns * stride) {
          const int64_t in_block = (x + padding) % stride;
          const int64_t count = std::min(stride - in_block, width - x);
          std::memcpy(
              out + x * position,
              block_row + (x + padding) / stride * stride * row_of_block + in_block * position,
              count * position);
          x += count;
        }
      }
      std::memset(out + x * position, 0, (width - x) * position);
    }
  });
  return image;
}

}  // namespace
}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("depth_to_space", TORCH_BOX(&lpips_fast::depth_to_space));
}
