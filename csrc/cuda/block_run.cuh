// A block's share of the work: a run of neighbouring positions of one image of one layer.
#pragma once

#include "launch_plan.h"

namespace lpips_fast::cuda {

__device__ __forceinline__ const LayerTask& layer_of_block(const LayerTasks& tasks) {
  int index = 0;
  for (int l = 1; l < tasks.layer_count; ++l)
    if (blockIdx.x >= tasks.layers[l].first_block) index = l;
  return tasks.layers[index];
}

struct BlockRun {
  int64_t image;
  int64_t first;  // position in the image
  int count;
  uint32_t tile;
  uint32_t block;       // in the layer
  int64_t row, column;  // of the first position; on a line, row 0 and column `first`
  uint32_t width;       // 0: a line

  __device__ __forceinline__ explicit BlockRun(const LayerTask& task) {
    block = blockIdx.x - task.first_block;
    const uint32_t in_batch = block / task.tiles;
    image = in_batch;
    tile = block - in_batch * task.tiles;
    first = int64_t{tile} * task.tile_positions;
    const int64_t left = task.positions - first;
    count = left < task.tile_positions ? static_cast<int>(left) : task.tile_positions;
    width = task.width;
    row = width ? first / width : 0;
    column = width ? first % width : first;
  }

  // Of the run's position `local`, in an average.
  template <typename A>
  __device__ __forceinline__ A position_weight(const LayerTask& task, int local) const {
    const A* line =
        static_cast<const A*>(task.position_weight.data) + image * task.position_weight.stride_n;
    return __ldg(line + first + local);
  }

  // Offsets are 64-bit; the run itself is counted in 32 bits.
  template <typename View>
  __device__ __forceinline__ int64_t start(const View& view) const {
    return image * view.stride_n + row * view.stride_h + (width ? 0 : column * view.stride_w);
  }

  // From start() to the run's position `local`.
  template <typename View>
  __device__ __forceinline__ int64_t offset(const View& view, int local) const {
    if (width == 0) return local * view.stride_w;
    const uint32_t from_row_start = static_cast<uint32_t>(column) + local;
    return (from_row_start / width) * view.stride_h + (from_row_start % width) * view.stride_w;
  }
};

}  // namespace lpips_fast::cuda
