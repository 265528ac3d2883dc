// Distance and gradient of channels-first (NCHW) layers, where positions of a channel are
// contiguous.
//
// Threads: a team of warps (1 to 16, a power of two chosen from C) takes a tile of positions: 64
// bytes of every channel (float32: 16 positions, half types: 32). Some bits of a thread's lane lie
// along the tile; the others, the warps, and the loads of a lane lie along the channels, 32 a warp.
// A block of 256 or 512 threads takes several tiles a round. Sums over channels go through
// shuffles, then through shared memory, where one thread a position adds the warps' sums in order
// and takes the square root.
//
// Memory: each feature is read once, in segments of 64 bytes, 16 bytes a lane and load (half types:
// 8), and stays packed in registers between the norm and the difference: C up to 512. More channels
// are walked in slabs of 512, as in channels_last_kernels.cuh. Where address, strides or H*W do not
// allow such loads (an odd H*W puts every other channel off the boundary), lanes load one element.
//   forward:  reads 2 features, with position weights 4 bytes a position; writes 4 bytes a position
//             (map) or a block (average)
//   backward: reads 2 features; writes each asked gradient once; weights: C sums a block
#pragma once

#include "block_run.cuh"
#include "unit_vectors.cuh"
#include "warp_reduce.cuh"

namespace lpips_fast::cuda {

template <typename T, bool kVectors>
struct TileShape {
  static constexpr int kSize = channels_first_vector(sizeof(T), kVectors);
  static constexpr int kTile = channels_first_tile(sizeof(T), kVectors);
  static constexpr int kLanes = kTile / kSize;              // along the tile
  static constexpr int kChannelLanes = kWarpSize / kLanes;  // along the channels
  static constexpr int kChunks = kChannelsPerWarp / kChannelLanes;
  static constexpr int kMaxWarps = kChannelsFirstMaxThreads / kWarpSize;
};

// A thread's place: which tile of the round, which positions of it, which channels.
template <typename Shape>
struct ChannelsFirstLane {
  int team_warps, teams, warp, team;
  int position;  // of its first element, in the tile
  int channel_lane;
  int first_channel, channel_step, slab_channels;

  __device__ __forceinline__ explicit ChannelsFirstLane(const LayerTask& task)
      : team_warps(task.team_warps),
        teams(static_cast<int>(blockDim.x) / kWarpSize / task.team_warps),
        warp(threadIdx.x / kWarpSize),
        team(warp / task.team_warps),
        position(threadIdx.x % Shape::kLanes * Shape::kSize),
        channel_lane(threadIdx.x % kWarpSize / Shape::kLanes),
        first_channel(warp % task.team_warps * Shape::kChannelLanes + channel_lane),
        channel_step(task.team_warps * Shape::kChannelLanes),
        slab_channels(task.team_warps * kChannelsPerWarp) {}

  __device__ __forceinline__ int channel(int slab, int k) const {
    return slab * slab_channels + k * channel_step + first_channel;
  }
};

// What a thread holds of a tile of one feature, zero beyond the last channel.
template <typename T, bool kVectors>
struct TileSlice {
  using Shape = TileShape<T, kVectors>;
  static constexpr int kSize = Shape::kSize, kChunks = Shape::kChunks;

  Vector<T, kSize> chunk[kChunks];

  __device__ __forceinline__ void load(const T* position, int64_t stride_c,
                                       const ChannelsFirstLane<Shape>& lane, int slab, int end) {
    const T* address = position + lane.channel(slab, 0) * stride_c;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      if (lane.channel(slab, k) < end) {
        chunk[k].load(address);
      } else {
        chunk[k].clear();
      }
      address += lane.channel_step * stride_c;
    }
  }

  template <typename A>
  __device__ __forceinline__ void add_squares(A (&sums)[kSize]) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      A x[kSize];
      chunk[k].unpack(x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[i] += x[i] * x[i];
    }
  }
};

// Sums over all channels of a tile, for kCount quantities. finish(team, quantity, position, sum) is
// called once for each, by one thread of the block; what it leaves in shared memory may be read
// after the call.
template <typename Shape, int kCount, typename A, typename Finish>
__device__ __forceinline__ void sum_over_channels(const A (&values)[kCount][Shape::kSize],
                                                  const ChannelsFirstLane<Shape>& lane,
                                                  A (&warp_sums)[Shape::kMaxWarps][2][Shape::kTile],
                                                  const Finish& finish) {
#pragma unroll
  for (int q = 0; q < kCount; ++q)
#pragma unroll
    for (int i = 0; i < Shape::kSize; ++i) {
      const A sum = sum_across_groups(values[q][i], Shape::kLanes);
      if (lane.channel_lane == 0) warp_sums[lane.warp][q][lane.position + i] = sum;
    }
  __syncthreads();
  for (int task = threadIdx.x; task < lane.teams * kCount * Shape::kTile; task += blockDim.x) {
    const int position = task % Shape::kTile, q = task / Shape::kTile % kCount;
    const int team = task / (Shape::kTile * kCount);
    A sum = 0;
    for (int w = 0; w < lane.team_warps; ++w)
      sum += warp_sums[team * lane.team_warps + w][q][position];
    finish(team, q, position, sum);
  }
  __syncthreads();
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kChannelsFirstMaxThreads, kVectors && sizeof(T) < 8 ? 2 : 1)
    channels_first_distance(const __grid_constant__ LayerTasks tasks) {
  using A = accumulator_t<T>;
  using Shape = TileShape<T, kVectors>;
  constexpr int kSize = Shape::kSize, kChunks = Shape::kChunks;
  __shared__ A warp_sums[Shape::kMaxWarps][2][Shape::kTile];
  __shared__ A inverse_norm[Shape::kMaxWarps][2][Shape::kTile];

  const LayerTask& task = layer_of_block(tasks);
  const BlockRun run(task);
  const ChannelsFirstLane<Shape> lane(task);
  const A eps = static_cast<A>(tasks.eps);
  const T* feat0 = static_cast<const T*>(task.feat0.data) + run.start(task.feat0);
  const T* feat1 = static_cast<const T*>(task.feat1.data) + run.start(task.feat1);
  const A* weight = static_cast<const A*>(task.weight);

  A total = 0;
  for (int round = 0; round < run.count; round += lane.teams * Shape::kTile) {
    const int tile = round + lane.team * Shape::kTile;
    const int local = tile + lane.position;
    const int end = local < run.count ? task.channels : 0;
    const T* vector0 = feat0 + run.offset(task.feat0, local);
    const T* vector1 = feat1 + run.offset(task.feat1, local);
    TileSlice<T, kVectors> a, b;
    A sums[2][kSize] = {};
    for (int slab = 0; slab < task.slabs; ++slab) {
      a.load(vector0, task.feat0.stride_c, lane, slab, end);
      b.load(vector1, task.feat1.stride_c, lane, slab, end);
      a.add_squares(sums[0]);
      b.add_squares(sums[1]);
    }
    sum_over_channels<Shape>(sums, lane, warp_sums, [&](int team, int q, int position, A sum) {
      inverse_norm[team][q][position] = Norm<A>(sum, eps).inverse;
    });

    A inverse0[kSize], inverse1[kSize], distance[1][kSize] = {};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      inverse0[i] = inverse_norm[lane.team][0][lane.position + i];
      inverse1[i] = inverse_norm[lane.team][1][lane.position + i];
    }
    for (int slab = task.slabs - 1; slab >= 0; --slab) {
      if (slab != task.slabs - 1) {
        a.load(vector0, task.feat0.stride_c, lane, slab, end);
        b.load(vector1, task.feat1.stride_c, lane, slab, end);
      }
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const int channel = lane.channel(slab, k);
        if (channel < end) {
          const A w = __ldg(weight + channel);
          A x[kSize], y[kSize];
          a.chunk[k].unpack(x);
          b.chunk[k].unpack(y);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A difference =
                rounded_product(x[i], inverse0[i]) - rounded_product(y[i], inverse1[i]);
            distance[0][i] += w * difference * difference;
          }
        }
      }
    }
    if (task.map) {
      A* map = static_cast<A*>(task.map) + run.image * task.positions + run.first + round;
      sum_over_channels<Shape>(distance, lane, warp_sums, [&](int team, int, int position, A sum) {
        const int in_round = team * Shape::kTile + position;
        if (round + in_round < run.count) map[in_round] = sum;
      });
    } else {
      if (task.position_weight.data) {
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          if (local + i < run.count) distance[0][i] *= run.position_weight<A>(task, local + i);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) total += distance[0][i];
    }
  }
  if (task.map) return;
  total = block_sum(total);
  if (threadIdx.x == 0)
    static_cast<A*>(tasks.sums)[task.sums_first + run.image * task.sums_stride_n + run.tile] =
        total / static_cast<A>(task.sums_divisor);
}

template <typename T, bool kVectors, bool kWeightGradient>
__global__ void __launch_bounds__(kChannelsFirstMaxThreads, 1)
    channels_first_backward(const __grid_constant__ LayerTasks tasks) {
  using A = accumulator_t<T>;
  using Shape = TileShape<T, kVectors>;
  constexpr int kSize = Shape::kSize, kChunks = Shape::kChunks;
  __shared__ A warp_sums[Shape::kMaxWarps][2][Shape::kTile];
  __shared__ A norm[Shape::kMaxWarps][2][Shape::kTile];
  __shared__ A inverse_norm[Shape::kMaxWarps][2][Shape::kTile];
  __shared__ A over_norm[Shape::kMaxWarps][2][Shape::kTile];

  const LayerTask& task = layer_of_block(tasks);
  const BlockRun run(task);
  const ChannelsFirstLane<Shape> lane(task);
  const A eps = static_cast<A>(tasks.eps);
  const A upstream_scale = static_cast<A>(task.upstream_scale);
  const T* feat0 = static_cast<const T*>(task.feat0.data) + run.start(task.feat0);
  const T* feat1 = static_cast<const T*>(task.feat1.data) + run.start(task.feat1);
  T* grad0 = static_cast<T*>(task.grad0.data);
  T* grad1 = static_cast<T*>(task.grad1.data);
  if (grad0) grad0 += run.start(task.grad0);
  if (grad1) grad1 += run.start(task.grad1);
  const A* upstream = static_cast<const A*>(task.upstream.data) + run.start(task.upstream);
  const A* weight = static_cast<const A*>(task.weight);

  // The weight's gradient: a lane's sums over its positions, in registers; where there are several
  // slabs, in the block's row of the workspace, of which every element belongs to one thread.
  A weight_sum[kChunks] = {};
  A* block_row = nullptr;
  if constexpr (kWeightGradient) {
    block_row = static_cast<A*>(tasks.workspace) + task.weight_rows_first +
                int64_t{run.block} * task.channels;
    if (task.slabs > 1 && lane.position == 0)
      for (int slab = 0; slab < task.slabs; ++slab)
        for (int k = 0; k < kChunks; ++k)
          if (lane.channel(slab, k) < task.channels) block_row[lane.channel(slab, k)] = 0;
  }

  for (int round = 0; round < run.count; round += lane.teams * Shape::kTile) {
    const int local = round + lane.team * Shape::kTile + lane.position;
    const int end = local < run.count ? task.channels : 0;
    const T* vector0 = feat0 + run.offset(task.feat0, local);
    const T* vector1 = feat1 + run.offset(task.feat1, local);
    A g[kSize] = {};
    if (end > 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        g[i] = upstream[run.offset(task.upstream, local + i)] * upstream_scale;
    }
    TileSlice<T, kVectors> a, b;
    A sums[2][kSize] = {};
    for (int slab = 0; slab < task.slabs; ++slab) {
      a.load(vector0, task.feat0.stride_c, lane, slab, end);
      b.load(vector1, task.feat1.stride_c, lane, slab, end);
      a.add_squares(sums[0]);
      b.add_squares(sums[1]);
    }
    sum_over_channels<Shape>(sums, lane, warp_sums, [&](int team, int q, int position, A sum) {
      const Norm<A> of_sum(sum, eps);
      norm[team][q][position] = of_sum.norm;
      inverse_norm[team][q][position] = of_sum.inverse;
    });

    const A* inverse0 = &inverse_norm[lane.team][0][lane.position];
    const A* inverse1 = &inverse_norm[lane.team][1][lane.position];
    A projections[2][kSize] = {};
    for (int slab = task.slabs - 1; slab >= 0; --slab) {
      if (slab != task.slabs - 1) {
        a.load(vector0, task.feat0.stride_c, lane, slab, end);
        b.load(vector1, task.feat1.stride_c, lane, slab, end);
      }
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const int channel = lane.channel(slab, k);
        A term = 0;
        if (channel < end) {
          const A w = __ldg(weight + channel);
          A x[kSize], y[kSize];
          a.chunk[k].unpack(x);
          b.chunk[k].unpack(y);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A unit0 = rounded_product(x[i], inverse0[i]);
            const A unit1 = rounded_product(y[i], inverse1[i]);
            const A difference = unit0 - unit1;
            const A t = 2 * g[i] * w * difference;
            projections[0][i] += t * unit0;
            projections[1][i] += t * unit1;
            if constexpr (kWeightGradient) term += g[i] * difference * difference;
          }
        }
        if constexpr (kWeightGradient) {
          if (task.slabs == 1) {
            weight_sum[k] += term;
          } else {
            term = group_sum(term, Shape::kLanes);
            if (lane.position == 0 && channel < task.channels) block_row[channel] += term;
          }
        }
      }
    }
    if (!grad0 && !grad1) continue;

    sum_over_channels<Shape>(
        projections, lane, warp_sums, [&](int team, int q, int position, A sum) {
          over_norm[team][q][position] = projection_over_norm(sum, norm[team][q][position]);
        });
    const A* over_norm0 = &over_norm[lane.team][0][lane.position];
    const A* over_norm1 = &over_norm[lane.team][1][lane.position];
    const A* norm0 = &norm[lane.team][0][lane.position];
    const A* norm1 = &norm[lane.team][1][lane.position];
    T* out0 = grad0 ? grad0 + run.offset(task.grad0, local) : nullptr;
    T* out1 = grad1 ? grad1 + run.offset(task.grad1, local) : nullptr;
    for (int slab = 0; slab < task.slabs; ++slab) {
      if (slab != 0) {
        a.load(vector0, task.feat0.stride_c, lane, slab, end);
        b.load(vector1, task.feat1.stride_c, lane, slab, end);
      }
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const int channel = lane.channel(slab, k);
        if (channel < end) {
          const A w = __ldg(weight + channel);
          A x[kSize], y[kSize];
          a.chunk[k].unpack(x);
          b.chunk[k].unpack(y);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A unit0 = rounded_product(x[i], inverse0[i]);
            const A unit1 = rounded_product(y[i], inverse1[i]);
            const A t = 2 * g[i] * w * (unit0 - unit1);
            x[i] = storable_gradient<T>(feature_gradient(t, inverse0[i], unit0, over_norm0[i]),
                                        norm0[i] == 0);
            y[i] = storable_gradient<T>(feature_gradient(-t, inverse1[i], unit1, -over_norm1[i]),
                                        norm1[i] == 0);
          }
          if (out0) Vector<T, kSize>::store(out0 + channel * task.grad0.stride_c, 0, x);
          if (out1) Vector<T, kSize>::store(out1 + channel * task.grad1.stride_c, 0, y);
        }
      }
    }
  }

  if constexpr (kWeightGradient) {
    if (task.slabs > 1) return;
    // Teams hold the same channels of other positions; they add up one after the other.
    __shared__ A team_row[kChannelsFirstMaxThreads / kWarpSize * kChannelsPerWarp];
#pragma unroll
    for (int k = 0; k < kChunks; ++k) weight_sum[k] = group_sum(weight_sum[k], Shape::kLanes);
    for (int turn = 0; turn < lane.teams; ++turn) {
      if (turn == lane.team && lane.position == 0) {
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
          const int channel = lane.channel(0, k);
          if (channel < task.channels)
            team_row[channel] = (turn == 0 ? A(0) : team_row[channel]) + weight_sum[k];
        }
      }
      __syncthreads();
    }
    for (int c = threadIdx.x; c < task.channels; c += blockDim.x) block_row[c] = team_row[c];
  }
}

}  // namespace lpips_fast::cuda
