// From images as users have them to what a trunk takes, in one pass (csrc/scale_images.h has the
// formula): one batch into its place in the joined one.
//
// Memory: reads each image once, writes it once.
//
// Threads: a thread takes as many neighbouring pixels as 16 bytes of the result hold elements (4 in
// float32, 8 in half types) and writes their three channels as three vectors of 16 bytes. It reads
// planes (the usual NCHW) or interleaved channels by loads of up to 16 bytes. Where address,
// strides or the width do not allow that, and in float64, a thread takes one pixel by single
// elements. Rows that adjoin in memory are one row.
//
// Where asked, an image with a result that is not finite is flagged: its word of `flags` becomes
// NaN, by an integer OR, which has no order.
//
// 2 x is exact, so that a multiply-add fused by the compiler gives the bits of the two operations.
#pragma once

#include "launch.cuh"
#include "row_blocks.h"
#include "vector_load.cuh"

namespace lpips_fast::cuda {

enum class PixelOrder { kPlanes, kInterleaved, kAny };

// A batch (N, 3, H, W), strides in elements.
struct ImageBatch {
  const void* data;
  int64_t n, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

struct ScaleTask {
  ImageBatch images;
  const void *shift, *scale;  // (3,) in the accumulator's dtype
  void* out;                  // (N, H, W, 3), dense
  uint32_t* flags;            // (N,), 0 before; may be null
  uint32_t parts;             // blocks a row
  bool unit_range;
};

constexpr uint32_t kNaN = 0x7fc00000;  // a float32's bits

// Infinity and NaN, as they are stored.
template <typename T>
__device__ __forceinline__ bool is_finite_stored(accumulator_t<T> x) {
  const accumulator_t<T> stored = to_accumulator(from_accumulator<T>(x));
  return stored - stored == 0;
}

template <typename Out>
constexpr int kPixelsPerThread = 16 / sizeof(Out);

template <typename In, typename Out>
constexpr bool kAllowsVectors = sizeof(In) < 8 && sizeof(Out) < 8;

template <typename In, typename Out, PixelOrder kOrder>
__global__ void __launch_bounds__(kRowThreads)
    scale_images(const __grid_constant__ ScaleTask task) {
  using A = accumulator_t<In>;
  constexpr int kPixels = kOrder == PixelOrder::kAny ? 1 : kPixelsPerThread<Out>;
  const ImageBatch& images = task.images;
  const uint32_t row = blockIdx.x / task.parts, part = blockIdx.x % task.parts;
  const int64_t column = (int64_t{part} * blockDim.x + threadIdx.x) * kPixels;
  if (column >= images.width) return;
  const uint32_t height = static_cast<uint32_t>(images.height);
  const In* from = static_cast<const In*>(images.data) + row / height * images.stride_n +
                   row % height * images.stride_h + column * images.stride_w;
  Out* to = static_cast<Out*>(task.out) + (row * images.width + column) * 3;

  A pixels[3 * kPixels];  // interleaved
  if constexpr (kOrder == PixelOrder::kInterleaved) {
#pragma unroll
    for (int third = 0; third < 3; ++third) {
      A values[kPixels];
      load_elements(values, from + third * kPixels);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) pixels[third * kPixels + i] = values[i];
    }
  } else {
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      A values[kPixels];
      load_elements(values, from + c * images.stride_c);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) pixels[3 * i + c] = values[i];
    }
  }
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const A shift = __ldg(static_cast<const A*>(task.shift) + c);
    const A scale = __ldg(static_cast<const A*>(task.scale) + c);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      A& x = pixels[3 * i + c];
      if (task.unit_range) x = 2 * x - 1;
      x = (x - shift) / scale;
    }
  }
  bool is_finite = true;
#pragma unroll
  for (int third = 0; third < 3; ++third) {
    accumulator_t<Out> values[kPixels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      values[i] = static_cast<accumulator_t<Out>>(pixels[third * kPixels + i]);
      is_finite = is_finite && is_finite_stored<Out>(values[i]);
    }
    Vector<Out, kPixels>::store(to, third, values);
  }
  if (task.flags && !is_finite) atomicOr(task.flags + row / height, kNaN);
}

template <typename In, typename Out>
PixelOrder pixel_order(const ImageBatch& images, const void* out) {
  constexpr int kPixels = kPixelsPerThread<Out>, kStep = kElementsPerLoad<In, kPixels>;
  const auto multiple = [](int64_t stride, int64_t extent) {
    return extent == 1 || stride % kStep == 0;
  };
  if (!kAllowsVectors<In, Out> || images.width % kPixels != 0 || !planning::aligned(out, 16) ||
      !planning::aligned(images.data, kStep * sizeof(In)) || !multiple(images.stride_n, images.n) ||
      !multiple(images.stride_h, images.height))
    return PixelOrder::kAny;
  if (images.stride_w == 1 && multiple(images.stride_c, 3)) return PixelOrder::kPlanes;
  if (images.stride_w == 3 && images.stride_c == 1) return PixelOrder::kInterleaved;
  return PixelOrder::kAny;
}

// `flags`: one word an image, 0 before; or null.
template <typename In, typename Out, typename Stream>
void launch_scale_images(ImageBatch images, const accumulator_t<In>* shift,
                         const accumulator_t<In>* scale, bool unit_range, Out* out, uint32_t* flags,
                         Stream stream) {
  if (images.width == 1) {
    images.stride_w = images.stride_h;
    images.width = images.height;
    images.height = 1;
  } else if (images.stride_h == images.width * images.stride_w) {
    images.width *= images.height;
    images.height = 1;
  }
  const PixelOrder order = pixel_order<In, Out>(images, out);
  const int64_t pixels = order == PixelOrder::kAny ? 1 : kPixelsPerThread<Out>;
  const RowBlocks cut = cut_rows(images.n * images.height, images.width / pixels);
  if (cut.blocks == 0) return;
  ScaleTask task{};
  task.images = images;
  task.shift = shift;
  task.scale = scale;
  task.out = out;
  task.flags = flags;
  task.parts = cut.parts;
  task.unit_range = unit_range;
  const auto run = [&](auto kernel) {
    LPIPS_FAST_LAUNCH(kernel, cut.blocks, cut.threads, stream, task);
  };
  if constexpr (kAllowsVectors<In, Out>) {
    if (order == PixelOrder::kPlanes) return run(scale_images<In, Out, PixelOrder::kPlanes>);
    if (order == PixelOrder::kInterleaved)
      return run(scale_images<In, Out, PixelOrder::kInterleaved>);
  }
  run(scale_images<In, Out, PixelOrder::kAny>);
}

}  // namespace lpips_fast::cuda
