// Distance and gradient of channels-last layers, where a position's channel vector is contiguous.
//
// Threads: a group of `lanes` neighbouring lanes (2 to 32, a power of two chosen from C) takes a
// position; lane j holds the vector's loads j, j + lanes, j + 2 lanes, ... A block of 256 threads
// takes 256/lanes positions a round, and its run of positions in several rounds.
//
// Memory: each feature is read once, 16 bytes a load, up to 4 loads of each feature in flight a
// lane, and stays packed in registers between the norm and the difference: C up to 512 (float32),
// 1024 (half types), 256 (float64). Wider vectors are walked in slabs of that size: a later pass
// starts with the slab that the earlier one ended with, still in registers, and reads the others
// again from L1 or L2. Features that do not allow 16-byte loads (address, strides or C) take the
// same path with loads of one element, and hold up to 512 channels (float64: 256).
//   forward:  reads 2 features, with position weights 4 bytes a position; writes 4 bytes a position
//             (map) or a block (average)
//   backward: reads 2 features; writes each asked gradient once; weights: C sums a block
//   of a tap: reads 2 features and the gradient from deeper layers; writes 1 gradient
#pragma once

#include "block_run.cuh"
#include "unit_vectors.cuh"
#include "warp_reduce.cuh"

namespace lpips_fast::cuda {

// A lane's place in its block, and which loads of the vector are its own.
template <int kChunks>
struct ChannelsLastLane {
  int groups, group, lane;
  unsigned step, loads;

  __device__ __forceinline__ explicit ChannelsLastLane(const LayerTask& task)
      : groups(kChannelsLastThreads >> task.lanes_log2),
        group(threadIdx.x >> task.lanes_log2),
        lane(threadIdx.x & (task.lanes - 1)),
        step(task.lanes),
        loads(task.chunks) {}

  __device__ __forceinline__ unsigned load(int slab, int k) const {
    return (slab * kChunks + k) * step + lane;
  }
  __device__ __forceinline__ bool owns(unsigned load) const { return load < loads; }
};

// What a lane holds of one channel vector. Only loads that it owns may be asked for.
template <typename T, bool kVectors>
struct ChannelSlice {
  static constexpr int kSize = channels_last_vector(sizeof(T), kVectors);
  static constexpr int kChunks = channels_last_chunks(sizeof(T), kVectors);
  using Lane = ChannelsLastLane<kChunks>;
  using A = accumulator_t<T>;

  Vector<T, kSize> chunk[kChunks];

  __device__ __forceinline__ void load(const T* vector, const Lane& lane, int slab) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const unsigned load = lane.load(slab, k);
      if (lane.owns(load)) chunk[k].load(vector, load);
    }
  }

  __device__ __forceinline__ void add_squares(A& sum, const Lane& lane, int slab) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      if (!lane.owns(lane.load(slab, k))) break;
      A x[kSize];
      chunk[k].unpack(x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum += x[i] * x[i];
    }
  }
};

// Blocks that a multiprocessor should hold, which bounds their registers: as many as come without
// spills, by the table of scripts/check_cuda_compile.py. 0 leaves the number to the compiler.
constexpr int channels_last_forward_blocks([[maybe_unused]] int element_size, bool vectors) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  if (vectors && element_size == 8) return 3;
#endif
  return vectors ? 4 : 2;
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kChannelsLastThreads,
                                  channels_last_forward_blocks(sizeof(T), kVectors))
    channels_last_distance(const __grid_constant__ LayerTasks tasks) {
  using A = accumulator_t<T>;
  using Slice = ChannelSlice<T, kVectors>;
  constexpr int kSize = Slice::kSize, kChunks = Slice::kChunks;

  const LayerTask& task = layer_of_block(tasks);
  const BlockRun run(task);
  const typename Slice::Lane lane(task);
  const A eps = static_cast<A>(tasks.eps);
  const T* feat0 = static_cast<const T*>(task.feat0.data) + run.start(task.feat0);
  const T* feat1 = static_cast<const T*>(task.feat1.data) + run.start(task.feat1);
  const A* weight = static_cast<const A*>(task.weight);

  A total = 0;
  // All lanes walk all rounds, since shuffles need them; a group past the end repeats the last
  // position and leaves no trace.
  for (int round = 0; round < run.count; round += lane.groups) {
    const bool past_end = round + lane.group >= run.count;
    const int local = past_end ? run.count - 1 : round + lane.group;
    const T* vector0 = feat0 + run.offset(task.feat0, local);
    const T* vector1 = feat1 + run.offset(task.feat1, local);
    Slice a, b;
    A sum0 = 0, sum1 = 0;
    for (int slab = 0; slab < task.slabs; ++slab) {
      a.load(vector0, lane, slab);
      b.load(vector1, lane, slab);
      a.add_squares(sum0, lane, slab);
      b.add_squares(sum1, lane, slab);
    }
    const Norm<A> norm(split_group_sum(sum0, sum1, task.lanes), eps);
    const Pair<A> inverse(norm.inverse);

    A distance = 0;
    for (int slab = task.slabs - 1; slab >= 0; --slab) {
      if (slab != task.slabs - 1) {
        a.load(vector0, lane, slab);
        b.load(vector1, lane, slab);
      }
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const unsigned load = lane.load(slab, k);
        if (lane.owns(load)) {
          A x[kSize], y[kSize], w[kSize];
          a.chunk[k].unpack(x);
          b.chunk[k].unpack(y);
          load_weights(w, weight, load);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A difference =
                rounded_product(x[i], inverse.feat0) - rounded_product(y[i], inverse.feat1);
            distance += w[i] * difference * difference;
          }
        }
      }
    }
    if (task.map) {
      distance = group_sum(distance, task.lanes);
      if (lane.lane == 0 && !past_end)
        static_cast<A*>(task.map)[run.image * task.positions + run.first + local] = distance;
    } else {
      // Once a position, behind all its channels. A weight of 1 leaves every bit as it is.
      if (task.position_weight.data) distance *= run.position_weight<A>(task, local);
      total += past_end ? A(0) : distance;
    }
  }
  if (task.map) return;
  total = block_sum(total);
  if (threadIdx.x == 0)
    static_cast<A*>(tasks.sums)[task.sums_first + run.image * task.sums_stride_n + run.tile] =
        total / static_cast<A>(task.sums_divisor);
}

// As channels_last_forward_blocks.
constexpr int channels_last_backward_blocks(int element_size, bool vectors, bool weight_gradient,
                                            bool tap) {
  if (weight_gradient) return 1;
  if (!vectors || (tap && element_size == 8)) return 2;
  return element_size == 2 ? 3 : 0;
}

// kTap: feat0 is a tap of a network, the result of a ReLU, and feat1 its target, without a
// gradient. What comes from deeper layers is added and the ReLU's derivative taken in the same
// pass.
template <typename T, bool kVectors, bool kWeightGradient, bool kTap>
__global__ void __launch_bounds__(kChannelsLastThreads,
                                  channels_last_backward_blocks(sizeof(T), kVectors,
                                                                kWeightGradient, kTap))
    channels_last_backward(const __grid_constant__ LayerTasks tasks) {
  using A = accumulator_t<T>;
  using Slice = ChannelSlice<T, kVectors>;
  constexpr int kSize = Slice::kSize, kChunks = Slice::kChunks;
  constexpr int kWarps = kChannelsLastThreads / kWarpSize;

  const LayerTask& task = layer_of_block(tasks);
  const BlockRun run(task);
  const typename Slice::Lane lane(task);
  const A eps = static_cast<A>(tasks.eps);
  const A upstream_scale = static_cast<A>(task.upstream_scale);
  const T* feat0 = static_cast<const T*>(task.feat0.data) + run.start(task.feat0);
  const T* feat1 = static_cast<const T*>(task.feat1.data) + run.start(task.feat1);
  T* grad0 = static_cast<T*>(task.grad0.data);
  T* grad1 = kTap ? nullptr : static_cast<T*>(task.grad1.data);
  const T* deeper = kTap ? static_cast<const T*>(task.deeper.data) : nullptr;
  if (grad0) grad0 += run.start(task.grad0);
  if (grad1) grad1 += run.start(task.grad1);
  if (deeper) deeper += run.start(task.deeper);
  const A* upstream = static_cast<const A*>(task.upstream.data) + run.start(task.upstream);
  const A* weight = static_cast<const A*>(task.weight);

  // The weight's gradient: in registers, or where there are several slabs in a row of the
  // workspace for each warp, of which every element belongs to one lane.
  const int warp = threadIdx.x / kWarpSize;
  A weight_sum[kChunks][kSize] = {};
  A* warp_row = nullptr;
  if constexpr (kWeightGradient) {
    if (task.slabs > 1) {
      warp_row = static_cast<A*>(tasks.workspace) + task.weight_rows_first +
                 (int64_t{run.block} * kWarps + warp) * task.channels;
      for (unsigned load = lane.lane; lane.owns(load); load += lane.step)
        for (int i = 0; i < kSize; ++i) warp_row[load * kSize + i] = 0;
    }
  }

  for (int round = 0; round < run.count; round += lane.groups) {
    const bool past_end = round + lane.group >= run.count;
    const int local = past_end ? run.count - 1 : round + lane.group;
    const T* vector0 = feat0 + run.offset(task.feat0, local);
    const T* vector1 = feat1 + run.offset(task.feat1, local);
    const A g = past_end ? A(0) : upstream[run.offset(task.upstream, local)] * upstream_scale;
    Slice a, b;
    A sum0 = 0, sum1 = 0;
    for (int slab = 0; slab < task.slabs; ++slab) {
      a.load(vector0, lane, slab);
      b.load(vector1, lane, slab);
      a.add_squares(sum0, lane, slab);
      b.add_squares(sum1, lane, slab);
    }
    const Norm<A> norm(split_group_sum(sum0, sum1, task.lanes), eps);
    const Pair<A> inverse(norm.inverse);

    A projection0 = 0, projection1 = 0;
    for (int slab = task.slabs - 1; slab >= 0; --slab) {
      if (slab != task.slabs - 1) {
        a.load(vector0, lane, slab);
        b.load(vector1, lane, slab);
      }
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const unsigned load = lane.load(slab, k);
        if (lane.owns(load)) {
          A x[kSize], y[kSize], w[kSize];
          a.chunk[k].unpack(x);
          b.chunk[k].unpack(y);
          load_weights(w, weight, load);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A unit0 = rounded_product(x[i], inverse.feat0);
            const A unit1 = rounded_product(y[i], inverse.feat1);
            const A difference = unit0 - unit1;
            const A t = 2 * g * w[i] * difference;
            projection0 += t * unit0;
            projection1 += t * unit1;
            if constexpr (kWeightGradient) {
              const A term = g * difference * difference;
              if (task.slabs == 1) {
                weight_sum[k][i] += term;
              } else {
                warp_row[load * kSize + i] += term;
              }
            }
          }
        }
      }
    }
    if (!grad0 && !grad1) continue;

    const Pair<A> over_norm(
        projection_over_norm(split_group_sum(projection0, projection1, task.lanes), norm.norm));
    bool zero0 = false, zero1 = false;
    if constexpr (kClampsZeroVectors<T>) {
      const Pair<A> norms(norm.norm);
      zero0 = norms.feat0 == 0;
      zero1 = norms.feat1 == 0;
    }
    if (past_end) continue;
    T* out0 = grad0 ? grad0 + run.offset(task.grad0, local) : nullptr;
    T* out1 = grad1 ? grad1 + run.offset(task.grad1, local) : nullptr;
    const T* from_deeper = deeper ? deeper + run.offset(task.deeper, local) : nullptr;
    for (int slab = 0; slab < task.slabs; ++slab) {
      if (slab != 0) {
        a.load(vector0, lane, slab);
        b.load(vector1, lane, slab);
      }
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const unsigned load = lane.load(slab, k);
        if (lane.owns(load)) {
          A x[kSize], y[kSize], w[kSize], more[kSize] = {};
          a.chunk[k].unpack(x);
          b.chunk[k].unpack(y);
          load_weights(w, weight, load);
          if (from_deeper) {
            Vector<T, kSize> vector;
            vector.load(from_deeper, load);
            vector.unpack(more);
          }
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A unit0 = rounded_product(x[i], inverse.feat0);
            const A unit1 = rounded_product(y[i], inverse.feat1);
            const A t = 2 * g * w[i] * (unit0 - unit1);
            A gradient = feature_gradient(t, inverse.feat0, unit0, over_norm.feat0);
            if constexpr (kTap) gradient = x[i] <= A(0) ? A(0) : gradient + more[i];
            x[i] = storable_gradient<T>(gradient, zero0);
            y[i] = storable_gradient<T>(
                feature_gradient(-t, inverse.feat1, unit1, -over_norm.feat1), zero1);
          }
          if (out0) Vector<T, kSize>::store(out0, load, x);
          if (out1) Vector<T, kSize>::store(out1, load, y);
        }
      }
    }
  }

  if constexpr (kWeightGradient) {
    if (task.slabs > 1) return;
    // Warps add their sums to the block's row one after the other: a fixed order, no atomics.
    __shared__ A block_row[kWarpSize * kChunks * kSize];
    const bool holds_sum = threadIdx.x % kWarpSize < static_cast<unsigned>(task.lanes);
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        weight_sum[k][i] = sum_across_groups(weight_sum[k][i], task.lanes);
    for (int turn = 0; turn < kWarps; ++turn) {
      if (turn == warp && holds_sum) {
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
          const unsigned load = lane.load(0, k);
          if (lane.owns(load)) {
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
              const A before = turn == 0 ? A(0) : block_row[load * kSize + i];
              block_row[load * kSize + i] = before + weight_sum[k][i];
            }
          }
        }
      }
      __syncthreads();
    }
    A* row = static_cast<A*>(tasks.workspace) + task.weight_rows_first +
             int64_t{run.block} * task.channels;
    for (int c = threadIdx.x; c < task.channels; c += kChannelsLastThreads) row[c] = block_row[c];
  }
}

}  // namespace lpips_fast::cuda
