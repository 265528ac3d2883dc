// How a call is cut into launches: which kernel serves a layer, how many lanes share a position,
// how many positions a block takes, how much workspace partial sums need. Plain C++ without torch
// and CUDA, so that the tests' emulation runs the plan that a GPU runs.
//
// All layers of one memory order and load width share a launch, so that a whole distance is one
// launch, or two where an image is cut into several blocks whose sums must be added.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../layer_view.h"

namespace lpips_fast::cuda {

constexpr int kWarpSize = 32;
constexpr int kMaxLayersPerLaunch = 8;  // keeps a launch's parameters under 4 KiB

// ---------------------------------------------------------------- geometry, shared with kernels

constexpr int kChannelsLastThreads = 256;
constexpr int kChannelsFirstMaxThreads = 512;

// One load of a lane, in elements: 16 bytes along the channels, or one element.
constexpr int channels_last_vector(int element_size, bool vectors) {
  return vectors ? 16 / element_size : 1;
}

// Loads of one feature that a lane keeps in registers between the norm and the difference.
constexpr int channels_last_chunks(int element_size, bool vectors) {
  return vectors ? 4 : (element_size == 8 ? 8 : 16);
}

// One load of a lane along the positions: 16 bytes, but 8 for half types, whose accumulators would
// otherwise crowd out the registers.
constexpr int channels_first_vector(int element_size, bool vectors) {
  return vectors ? (element_size == 8 ? 2 : 4) : 1;
}

// Positions of a tile: 64 bytes of a channel (32 for half types without vector loads).
constexpr int channels_first_tile(int element_size, bool vectors) {
  return element_size == 8 ? 8 : (element_size == 2 && vectors ? 32 : 16);
}

constexpr int64_t kMaxChannels = int64_t{1} << 27;  // a vector's bytes are counted in 32 bits

// Channels that one warp keeps in registers for a tile.
constexpr int kChannelsPerWarp = 32;

// ------------------------------------------------------------------------------ what is asked

// dL/d(distance): one number a position, or one an image where stride_h and stride_w are 0.
struct UpstreamView {
  const void* data;
  int64_t stride_n, stride_h, stride_w;
};

// A weight for every position of an average, in lines of H*W; data null: all count alike. stride_n
// is 0 where one line is for all images.
struct PositionWeightView {
  const void* data;
  int64_t stride_n;
};

// One layer of a call. A forward has `map` or averages; a backward has an upstream gradient and at
// least one gradient to write.
struct LayerWork {
  LayerView layer;
  void* map = nullptr;  // (N, H, W), contiguous
  UpstreamView upstream{};
  double upstream_scale = 1;  // 1/(H*W) for an averaged distance
  GradientView grad0{}, grad1{};
  void* grad_weight = nullptr;  // (C,)
  FeatureView deeper{};         // of a tap: the gradient from deeper layers; data null: none
  PositionWeightView position_weight{};  // of an average
};

// ------------------------------------------------------------------------- what a kernel is told

struct LayerTask {
  FeatureView feat0, feat1;
  GradientView grad0, grad1;
  FeatureView deeper;
  UpstreamView upstream;
  double upstream_scale;
  const void* weight;
  void* map;
  PositionWeightView position_weight;
  int64_t positions;                                // H*W
  int64_t sums_first, sums_stride_n, sums_divisor;  // where a block leaves its sum of distances
  int64_t weight_rows_first;    // where its rows of the weight's gradient begin in the workspace
  uint32_t width;               // of a row; 0 where rows adjoin and positions are one line
  uint32_t first_block, tiles;  // tiles: blocks an image
  int32_t tile_positions;
  int32_t channels;
  int32_t chunks;             // channels-last: loads that make up a channel vector
  int32_t lanes, lanes_log2;  // channels-last: lanes that share a position; a power of two
  int32_t team_warps;         // channels-first: warps that share a tile; a power of two
  int32_t slabs;              // parts of the channels that fit in registers at a time; mostly 1
};

struct LayerTasks {
  LayerTask layers[kMaxLayersPerLaunch];
  int32_t layer_count;
  double eps;
  void* sums;
  void* workspace;
};

static_assert(sizeof(LayerTasks) <= 4096, "a kernel's parameters are limited to 4 KiB");

// The mean of a layer's partial sums, for every image.
struct MeanTask {
  int64_t sums_first, divisor;
  uint32_t tiles;
  int32_t column;
};

struct MeanTasks {
  MeanTask layers[kMaxLayersPerLaunch];
  int32_t layer_count, columns;
  const void* sums;
  void* out;  // (N, columns)
};

// The sum of a layer's rows of the weight's gradient.
struct WeightTask {
  int64_t rows_first, rows;
  void* out;
  int32_t channels;
  uint32_t first_block;
};

struct WeightTasks {
  WeightTask layers[kMaxLayersPerLaunch];
  int32_t layer_count;
  const void* workspace;
};

constexpr int kWeightSumChannels = 32, kWeightSumRows = 16;  // shape of a block that adds rows

struct Launch {
  MemoryOrder order;
  bool vectors;
  int threads;
  uint32_t blocks;
  LayerTasks tasks{};
  bool writes_means = false;  // no partial sums: every image of every layer is one block
  MeanTasks means{};
  uint32_t mean_blocks = 0;
  WeightTasks weights{};
  uint32_t weight_blocks = 0;
};

struct Plan {
  std::vector<Launch> launches;
  int64_t workspace = 0;  // in accumulators
};

enum class Operation { kAverage, kMap, kBackward };

// ------------------------------------------------------------------------------------ planning

namespace planning {

// A layer's grid of positions, after adjoining rows have become one line.
struct Grid {
  int64_t height, width;
  bool single_column;  // W == 1: positions follow each other with stride_h
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t power_of_two_at_least(int64_t x) {
  int64_t p = 1;
  while (p < x) p *= 2;
  return p;
}

template <typename View>
bool rows_adjoin(const View& view, int64_t width) {
  return view.data == nullptr || view.stride_h == width * view.stride_w;
}

inline Grid grid_of(const LayerWork& work) {
  const int64_t h = work.layer.h, w = work.layer.w;
  if (w == 1) return {1, h, true};
  if (h == 1 || (rows_adjoin(work.layer.feat0, w) && rows_adjoin(work.layer.feat1, w) &&
                 rows_adjoin(work.grad0, w) && rows_adjoin(work.grad1, w) &&
                 rows_adjoin(work.deeper, w) && rows_adjoin(work.upstream, w)))
    return {1, h * w, false};
  return {h, w, false};
}

template <typename View>
View along(View view, const Grid& grid) {
  if (grid.single_column) view.stride_w = view.stride_h;
  if (grid.height == 1) view.stride_h = 0;
  return view;
}

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether every load and store of a view may be one of `vector` elements along its dense dimension.
template <typename View>
bool vector_view(const View& view, const LayerView& layer, const Grid& grid, int element_size,
                 int vector) {
  if (view.data == nullptr) return true;
  const auto multiple = [&](int64_t stride, int64_t extent) {
    return extent == 1 || stride % vector == 0;
  };
  const bool channels_last = layer.order == MemoryOrder::kChannelsLast;
  return aligned(view.data, vector * element_size) && multiple(view.stride_n, layer.n) &&
         multiple(view.stride_h, grid.height) &&
         (channels_last ? multiple(view.stride_w, grid.width)
                        : view.stride_w == 1 && multiple(view.stride_c, layer.c));
}

inline bool vectors_allowed(const LayerWork& work, int element_size) {
  const LayerView& layer = work.layer;
  const bool channels_last = layer.order == MemoryOrder::kChannelsLast;
  const int vector = channels_last ? channels_last_vector(element_size, true)
                                   : channels_first_vector(element_size, true);
  const Grid grid = grid_of(work);
  const int64_t dense_extent = channels_last ? layer.c : grid.width;
  const auto fits = [&](const auto& view) {
    return vector_view(along(view, grid), layer, grid, element_size, vector);
  };
  return dense_extent % vector == 0 && (!channels_last || aligned(layer.weight, 16)) &&
         fits(layer.feat0) && fits(layer.feat1) && fits(work.grad0) && fits(work.grad1) &&
         fits(work.deeper);
}

// Warps that share a tile, channels-first: enough to hold all channels in registers, if possible.
inline int team_warps(int64_t channels) {
  const int64_t wanted = power_of_two_at_least(divide_up(channels, kChannelsPerWarp));
  return static_cast<int>(std::min<int64_t>(wanted, kChannelsFirstMaxThreads / kWarpSize));
}

inline LayerTask describe(const LayerWork& work, int element_size, bool vectors) {
  const LayerView& layer = work.layer;
  const Grid grid = grid_of(work);
  if (layer.c > kMaxChannels)
    throw std::invalid_argument("lpips_fast: more than 2^27 channels are not supported");
  if (grid.height > 1 && grid.width > INT32_MAX)
    throw std::invalid_argument(
        "lpips_fast: rows of more than 2^31-1 positions are not supported where rows do not adjoin "
        "in memory; make the features contiguous");
  LayerTask task{};
  task.feat0 = along(layer.feat0, grid);
  task.feat1 = along(layer.feat1, grid);
  task.grad0 = along(work.grad0, grid);
  task.grad1 = along(work.grad1, grid);
  task.deeper = along(work.deeper, grid);
  task.upstream = along(work.upstream, grid);
  task.upstream_scale = work.upstream_scale;
  task.weight = layer.weight;
  task.map = work.map;
  task.position_weight = work.position_weight;
  task.positions = layer.h * layer.w;
  task.width = grid.height > 1 ? static_cast<uint32_t>(grid.width) : 0;
  task.channels = static_cast<int32_t>(layer.c);
  if (layer.order == MemoryOrder::kChannelsLast) {
    const int64_t held = channels_last_chunks(element_size, vectors);
    const int64_t chunks = divide_up(layer.c, channels_last_vector(element_size, vectors));
    // Few lanes a position spread the cost of square roots and shuffles over more channels. Yet at
    // least 64 bytes (8 elements) of a vector should come from neighbouring lanes, and a position
    // has at least two of them, one for each feature's square root.
    const int64_t neighbours =
        std::clamp<int64_t>(power_of_two_at_least(chunks), 2, vectors ? 4 : 8);
    const int64_t lanes =
        std::clamp<int64_t>(power_of_two_at_least(divide_up(chunks, held)), neighbours, kWarpSize);
    task.chunks = static_cast<int32_t>(chunks);
    task.lanes = static_cast<int32_t>(lanes);
    while ((1 << task.lanes_log2) < lanes) ++task.lanes_log2;
    task.slabs = static_cast<int32_t>(divide_up(chunks, lanes * held));
  } else {
    task.team_warps = team_warps(layer.c);
    task.slabs =
        static_cast<int32_t>(divide_up(layer.c, int64_t{kChannelsPerWarp} * task.team_warps));
  }
  return task;
}

inline int64_t positions_per_round(const LayerTask& task, const Launch& launch, int element_size) {
  if (launch.order == MemoryOrder::kChannelsLast) return launch.threads / task.lanes;
  return int64_t{channels_first_tile(element_size, launch.vectors)} *
         (launch.threads / kWarpSize / task.team_warps);
}

// Blocks that a multiprocessor runs at a time, about, and rounds that are worth a block's start.
constexpr int64_t kResidentBlocks = 4, kWorthwhileRounds = 4;
// A block's start, in rounds: about a quarter.
constexpr int64_t kStartsPerRound = 4;

// The rounds of an image of every layer, and how often they come.
struct ImageRounds {
  int64_t images, rounds;
};

// How many rounds a block should take so that a device that runs `slots` blocks at a time is done
// first: waves of blocks, times what a block of a wave takes. 2048 rounds on 528 slots are one wave
// of 512 blocks of four, and 1.3 waves, that is two, of 683 blocks of three.
inline int64_t balanced_rounds(const std::vector<ImageRounds>& layers, int64_t slots) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t candidate = 1; candidate <= kWorthwhileRounds; ++candidate) {
    int64_t blocks = 0;
    for (const ImageRounds& layer : layers)
      blocks += layer.images * divide_up(layer.rounds, candidate);
    const int64_t time = divide_up(blocks, slots) * (candidate * kStartsPerRound + 1);
    if (time <= least) {
      least = time;
      best = candidate;
    }
  }
  return best;
}

// Cuts the layers' positions into blocks. A block walks through a run of positions of one image in
// rounds; rounds are alike in bytes for all layers, so that blocks of equal rounds are balanced.
// Small calls are spread over all multiprocessors; large ones come in several waves, which evens
// out their ends, of at most `blocks_per_multiprocessor`.
inline void cut_into_blocks(Launch& launch, const std::vector<LayerWork>& works, int element_size,
                            int64_t multiprocessors, int64_t blocks_per_multiprocessor,
                            bool sums_over_image) {
  std::vector<ImageRounds> layers;
  int64_t total_rounds = 0, longest_image = 0;
  for (size_t l = 0; l < works.size(); ++l) {
    const LayerTask& task = launch.tasks.layers[l];
    const int64_t rounds =
        divide_up(task.positions, positions_per_round(task, launch, element_size));
    layers.push_back({works[l].layer.n, rounds});
    total_rounds += works[l].layer.n * rounds;
    longest_image = std::max(longest_image, rounds);
  }
  int64_t most_rounds = balanced_rounds(layers, multiprocessors * kResidentBlocks);
  // A small image in one block saves the launch that would add the blocks' sums.
  if (sums_over_image && longest_image <= kWorthwhileRounds) most_rounds = kWorthwhileRounds;
  most_rounds =
      std::max(most_rounds, divide_up(total_rounds, multiprocessors * blocks_per_multiprocessor));
  int64_t blocks = 0;
  for (size_t l = 0; l < works.size(); ++l) {
    LayerTask& task = launch.tasks.layers[l];
    const int64_t in_round = positions_per_round(task, launch, element_size);
    const int64_t rounds = divide_up(task.positions, in_round);
    const int64_t tiles = divide_up(rounds, most_rounds);
    const int64_t tile_positions = in_round * divide_up(rounds, std::max<int64_t>(tiles, 1));
    if (tile_positions > INT32_MAX)
      throw std::invalid_argument(
          "lpips_fast: a block would have more than 2^31-1 positions; split the images");
    task.tile_positions = static_cast<int32_t>(tile_positions);
    task.tiles = static_cast<uint32_t>(tiles);
    task.first_block = static_cast<uint32_t>(blocks);
    blocks += works[l].layer.n * tiles;
    if (std::max(blocks, works[l].layer.n * kMaxLayersPerLaunch) > INT32_MAX)
      throw std::invalid_argument(
          "lpips_fast: the batch needs more than 2^31-1 blocks; split it into smaller batches");
  }
  launch.blocks = static_cast<uint32_t>(blocks);
}

}  // namespace planning

// Plans a call. `columns` is the number of layers of the whole call, (N, columns) its averages.
inline Plan plan_call(Operation operation, const std::vector<LayerWork>& works, int element_size,
                      int multiprocessors) {
  using namespace planning;
  struct Group {
    MemoryOrder order;
    bool vectors;
    std::vector<LayerWork> works;
    std::vector<int32_t> columns;
  };
  std::vector<Group> groups;
  for (size_t l = 0; l < works.size(); ++l) {
    const MemoryOrder order = works[l].layer.order;
    const bool vectors = vectors_allowed(works[l], element_size);
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
      return g.order == order && g.vectors == vectors && g.works.size() < kMaxLayersPerLaunch;
    });
    if (group == groups.end()) group = groups.insert(groups.end(), {order, vectors, {}, {}});
    group->works.push_back(works[l]);
    group->columns.push_back(static_cast<int32_t>(l));
  }

  Plan plan;
  for (const Group& group : groups) {
    Launch launch;
    launch.order = group.order;
    launch.vectors = group.vectors;
    launch.tasks.layer_count = static_cast<int32_t>(group.works.size());
    bool weight_gradient = false;
    int warps = kChannelsLastThreads / kWarpSize;
    for (size_t l = 0; l < group.works.size(); ++l) {
      launch.tasks.layers[l] = describe(group.works[l], element_size, group.vectors);
      weight_gradient |= group.works[l].grad_weight != nullptr;
      warps = std::max(warps, launch.tasks.layers[l].team_warps);
    }
    launch.threads = warps * kWarpSize;
    // Every block of a weight's gradient leaves a row to be added: they are kept fewer.
    cut_into_blocks(launch, group.works, element_size, multiprocessors, weight_gradient ? 8 : 32,
                    operation == Operation::kAverage);

    const int64_t images = group.works[0].layer.n;
    if (operation == Operation::kAverage) {
      launch.writes_means =
          std::all_of(launch.tasks.layers, launch.tasks.layers + launch.tasks.layer_count,
                      [](const LayerTask& task) { return task.tiles == 1; });
      launch.means.layer_count = launch.tasks.layer_count;
      launch.means.columns = static_cast<int32_t>(works.size());
      launch.mean_blocks =
          launch.writes_means ? 0 : static_cast<uint32_t>(images * launch.tasks.layer_count);
      for (int32_t l = 0; l < launch.tasks.layer_count; ++l) {
        LayerTask& task = launch.tasks.layers[l];
        const int32_t column = group.columns[l];
        if (launch.writes_means) {
          task.sums_first = column;
          task.sums_stride_n = static_cast<int64_t>(works.size());
          task.sums_divisor = task.positions;
        } else {
          task.sums_first = plan.workspace;
          task.sums_stride_n = task.tiles;
          task.sums_divisor = 1;
          plan.workspace += images * task.tiles;
        }
        launch.means.layers[l] = {task.sums_first, task.positions, task.tiles, column};
      }
    }
    if (weight_gradient) {
      int64_t blocks = 0;
      launch.weights.layer_count = launch.tasks.layer_count;
      for (int32_t l = 0; l < launch.tasks.layer_count; ++l) {
        LayerTask& task = launch.tasks.layers[l];
        // Where the channels do not fit in registers, every warp keeps a row of its own
        // (channels-first: the whole block is one team, so that the block does).
        const bool row_per_warp = group.order == MemoryOrder::kChannelsLast && task.slabs > 1;
        const int64_t rows = images * task.tiles * (row_per_warp ? warps : 1);
        task.weight_rows_first = plan.workspace;
        plan.workspace += rows * task.channels;
        launch.weights.layers[l] = {task.weight_rows_first, rows, group.works[l].grad_weight,
                                    task.channels, static_cast<uint32_t>(blocks)};
        blocks += divide_up(task.channels, kWeightSumChannels);
      }
      launch.weight_blocks = static_cast<uint32_t>(blocks);
    }
    plan.launches.push_back(launch);
  }
  return plan;
}

}  // namespace lpips_fast::cuda
