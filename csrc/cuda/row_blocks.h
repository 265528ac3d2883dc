// How rows of equal length are cut into blocks: a block belongs to one row, and its threads take
// neighbouring items of it. Plain C++, so that the tests' emulation runs what a GPU runs.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "launch_plan.h"

namespace lpips_fast::cuda {

constexpr int kRowThreads = 256;  // at most, a block

struct RowBlocks {
  uint32_t parts;   // blocks a row
  uint32_t blocks;  // of all rows; 0 where there is nothing to do
  int threads;
};

inline RowBlocks cut_rows(int64_t rows, int64_t items) {
  using planning::divide_up;
  if (rows == 0 || items == 0) return {1, 0, kWarpSize};
  const int64_t parts = divide_up(items, kRowThreads);
  if (parts > INT32_MAX / rows)
    throw std::invalid_argument(
        "lpips_fast: the batch needs more than 2^31-1 blocks; split it into smaller batches");
  // Blocks of a row alike, so that its last one is not almost empty.
  const int64_t threads = divide_up(divide_up(items, parts), kWarpSize) * kWarpSize;
  return {static_cast<uint32_t>(parts), static_cast<uint32_t>(parts * rows),
          static_cast<int>(threads)};
}

}  // namespace lpips_fast::cuda
