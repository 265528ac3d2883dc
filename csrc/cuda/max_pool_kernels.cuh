// Max-pooling of dense channels-last images (csrc/max_pool.h has the contract).
//
// Memory:
//   forward:  reads the images once, where windows overlap mostly from the L1 cache; writes the
//             pooled once. No indices.
//   backward: reads images, pooled and gradient once, what is near each other mostly from the L1
//             cache; writes the gradient once.
//
// Threads: one takes a vector of channels, 16 bytes (single elements where the address or the
// number of channels does not allow them), of one position: pooled in the forward, of the image in
// the backward. Neighbouring threads take neighbouring channels, then the next position of the row.
//
// The backward gathers: a position looks at every window that holds it (4 of 3x3 with stride 2, 1
// of 2x2), whether it is the window's first maximum, and adds up in the order of the windows. So
// nothing is added atomically, and the same inputs give the same bits.
#pragma once

#include <cmath>

#include "../pool_shape.h"
#include "launch.cuh"
#include "row_blocks.h"
#include "vector_load.cuh"

namespace lpips_fast::cuda {

struct PoolTask {
  const void *x, *y, *grad_y;  // the forward has x alone
  void* out;                   // y, or in the backward the gradient to x
  int32_t height, width, out_height, out_width, kernel, stride;
  uint32_t chunks;  // vectors that make up the channels of a position
  uint32_t parts;   // blocks a row
};

// A thread's place: a row of all images' rows, a position in it, a vector of its channels.
struct PoolPlace {
  uint32_t image, row, column, chunk;
  bool beyond;

  __device__ __forceinline__ PoolPlace(const PoolTask& task, int32_t height, int32_t width) {
    const uint32_t item = blockIdx.x % task.parts * blockDim.x + threadIdx.x;
    const uint32_t row_of_all = blockIdx.x / task.parts;
    image = row_of_all / height;
    row = row_of_all % height;
    column = item / task.chunks;
    chunk = item % task.chunks;
    beyond = column >= static_cast<uint32_t>(width);
  }
};

// kKernel: the window's size, known to the compiler, or 0.
template <typename T, int kSize, int kKernel>
__global__ void __launch_bounds__(kRowThreads) max_pool(const __grid_constant__ PoolTask task) {
  using A = accumulator_t<T>;
  const PoolPlace place(task, task.out_height, task.out_width);
  if (place.beyond) return;
  const int kernel = kKernel ? kKernel : task.kernel;
  const int top = place.row * task.stride, left = place.column * task.stride;
  const int64_t step = int64_t{task.chunks} * kSize;  // from a position to the next
  const T* x = static_cast<const T*>(task.x) +
               int64_t{place.image} * task.height * task.width * step + place.chunk * kSize;
  A largest[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) largest[i] = -INFINITY;
#pragma unroll
  for (int r = 0; r < kernel; ++r) {
    // Beyond the edge the last row and column are looked at again: their loads need no branch.
    const int row = min(top + r, task.height - 1);
#pragma unroll
    for (int c = 0; c < kernel; ++c) {
      const int column = min(left + c, task.width - 1);
      Vector<T, kSize> vector;
      vector.load(x + (int64_t{row} * task.width + column) * step);
      A values[kSize];
      vector.unpack(values);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (values[i] > largest[i] || values[i] != values[i]) largest[i] = values[i];
    }
  }
  const int64_t at = (int64_t{place.image} * task.out_height + place.row) * task.out_width;
  Vector<T, kSize>::store(static_cast<T*>(task.out) + (at + place.column) * step, place.chunk,
                          largest);
}

// Which elements are a window's maximum: equal to it, or NaN.
template <typename A, int kSize>
__device__ __forceinline__ uint32_t maxima(const A (&values)[kSize], const A (&largest)[kSize]) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i)
    mask |= static_cast<uint32_t>(values[i] == largest[i] || values[i] != values[i]) << i;
  return mask;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kRowThreads, 4)
    max_pool_backward(const __grid_constant__ PoolTask task) {
  using A = accumulator_t<T>;
  const PoolPlace place(task, task.height, task.width);
  if (place.beyond) return;
  const int row = place.row, column = place.column;
  const int64_t step = int64_t{task.chunks} * kSize;
  const int64_t image = place.image;
  const T* x =
      static_cast<const T*>(task.x) + image * task.height * task.width * step + place.chunk * kSize;
  const int64_t pooled = image * task.out_height * task.out_width * step + place.chunk * kSize;
  const T* y = static_cast<const T*>(task.y) + pooled;
  const T* grad_y = static_cast<const T*>(task.grad_y) + pooled;

  A sum[kSize] = {}, own[kSize];
  Vector<T, kSize> vector;
  const int64_t at = (int64_t{row} * task.width + column) * step;
  vector.load(x + at);
  vector.unpack(own);
  // Windows that hold the position: from the first that reaches it to the last that starts by it.
  const int first_row = row < task.kernel ? 0 : (row - task.kernel) / task.stride + 1;
  const int first_column = column < task.kernel ? 0 : (column - task.kernel) / task.stride + 1;
  const int last_row = min(row / task.stride, task.out_height - 1);
  const int last_column = min(column / task.stride, task.out_width - 1);
  for (int out_row = first_row; out_row <= last_row; ++out_row) {
    for (int out_column = first_column; out_column <= last_column; ++out_column) {
      const int64_t window = (int64_t{out_row} * task.out_width + out_column) * step;
      A largest[kSize], values[kSize];
      vector.load(y + window);
      vector.unpack(largest);
      uint32_t mask = maxima(own, largest);
      // Another maximum before this one in the window takes the gradient.
      const int left = out_column * task.stride;
      const int right = min(left + task.kernel, task.width);
      for (int r = out_row * task.stride; mask != 0 && r <= row; ++r) {
        const int end = r < row ? right : column;
        for (int c = left; mask != 0 && c < end; ++c) {
          vector.load(x + (int64_t{r} * task.width + c) * step);
          vector.unpack(values);
          mask &= ~maxima(values, largest);
        }
      }
      if (mask == 0) continue;
      vector.load(grad_y + window);
      vector.unpack(values);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (mask >> i & 1) sum[i] += values[i];
    }
  }
  Vector<T, kSize>::store(static_cast<T*>(task.out) + image * task.height * task.width * step + at,
                          place.chunk, sum);
}

namespace planning {

// Beyond, sums of two of them would not fit in 32 bits; addresses are counted in 64.
constexpr int64_t kMaxPoolSize = int64_t{1} << 29;

// A task without its pointers, for loads of `vector` elements.
inline PoolTask describe(const PoolShape& shape, int64_t vector) {
  for (const int64_t size :
       {shape.height, shape.width, shape.out_height, shape.out_width, shape.kernel, shape.stride})
    if (size > kMaxPoolSize)
      throw std::invalid_argument(
          "lpips_fast: pooling of more than 2^29 rows or columns is not supported");
  if (shape.channels > kMaxChannels ||
      shape.width * (shape.channels / vector) > UINT32_MAX - kRowThreads)
    throw std::invalid_argument(
        "lpips_fast: pooling of rows of more than 2^32 vectors is not supported");
  PoolTask task{};
  task.height = static_cast<int32_t>(shape.height);
  task.width = static_cast<int32_t>(shape.width);
  task.out_height = static_cast<int32_t>(shape.out_height);
  task.out_width = static_cast<int32_t>(shape.out_width);
  task.kernel = static_cast<int32_t>(shape.kernel);
  task.stride = static_cast<int32_t>(shape.stride);
  task.chunks = static_cast<uint32_t>(shape.channels / vector);
  return task;
}

}  // namespace planning

// `images` of dense (H, W, C) at x, pooled to y.
template <typename T, typename Stream>
void launch_max_pool(const T* x, T* y, int64_t images, const PoolShape& shape, Stream stream) {
  using planning::aligned;
  constexpr int kSize = 16 / sizeof(T);
  const bool vectors = shape.channels % kSize == 0 && aligned(x, 16) && aligned(y, 16);
  PoolTask task = planning::describe(shape, vectors ? kSize : 1);
  const RowBlocks cut = cut_rows(images * shape.out_height, shape.out_width * int64_t{task.chunks});
  if (cut.blocks == 0) return;
  task.x = x;
  task.out = y;
  task.parts = cut.parts;
  const auto run = [&](auto kernel) {
    LPIPS_FAST_LAUNCH(kernel, cut.blocks, cut.threads, stream, task);
  };
  const auto choose = [&](auto two, auto three, auto any) {
    run(shape.kernel == 2 ? two : shape.kernel == 3 ? three : any);
  };
  if (vectors) {
    choose(max_pool<T, kSize, 2>, max_pool<T, kSize, 3>, max_pool<T, kSize, 0>);
  } else {
    choose(max_pool<T, 1, 2>, max_pool<T, 1, 3>, max_pool<T, 1, 0>);
  }
}

template <typename T, typename Stream>
void launch_max_pool_backward(const T* grad_y, const T* x, const T* y, T* grad_x, int64_t images,
                              const PoolShape& shape, Stream stream) {
  using planning::aligned;
  constexpr int kSize = 16 / sizeof(T);
  const bool vectors = shape.channels % kSize == 0 && aligned(grad_y, 16) && aligned(x, 16) &&
                       aligned(y, 16) && aligned(grad_x, 16);
  PoolTask task = planning::describe(shape, vectors ? kSize : 1);
  const RowBlocks cut = cut_rows(images * shape.height, shape.width * int64_t{task.chunks});
  if (cut.blocks == 0) return;
  task.x = x;
  task.y = y;
  task.grad_y = grad_y;
  task.out = grad_x;
  task.parts = cut.parts;
  if (vectors) {
    LPIPS_FAST_LAUNCH((max_pool_backward<T, kSize>), cut.blocks, cut.threads, stream, task);
  } else {
    LPIPS_FAST_LAUNCH((max_pool_backward<T, 1>), cut.blocks, cut.threads, stream, task);
  }
}

}  // namespace lpips_fast::cuda
