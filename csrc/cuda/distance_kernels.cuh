// The kernels' front door, free of torch: runs a plan (launch_plan.h) on a stream.
//
//   channels_last_kernels.cuh   channels_first_kernels.cuh   partial_sum_kernels.cuh
//
// Nothing here waits for the device or allocates: a call may be captured in a CUDA graph.
#pragma once

#include "channels_first_kernels.cuh"
#include "channels_last_kernels.cuh"
#include "launch.cuh"
#include "launch_plan.h"
#include "partial_sum_kernels.cuh"

namespace lpips_fast::cuda {

// `out` is (N, L) for averaged distances; maps are in the plan. `workspace` has plan.workspace
// accumulators.
template <typename T, typename Stream>
void launch_distance(const Plan& plan, double eps, void* workspace, void* out, Stream stream) {
  using A = accumulator_t<T>;
  for (const Launch& launch : plan.launches) {
    LayerTasks tasks = launch.tasks;
    tasks.eps = eps;
    tasks.sums = launch.writes_means ? out : workspace;
    if (launch.blocks > 0) {
      const auto run = [&](auto kernel) {
        LPIPS_FAST_LAUNCH(kernel, launch.blocks, launch.threads, stream, tasks);
      };
      if (launch.order == MemoryOrder::kChannelsLast) {
        run(launch.vectors ? channels_last_distance<T, true> : channels_last_distance<T, false>);
      } else {
        run(launch.vectors ? channels_first_distance<T, true> : channels_first_distance<T, false>);
      }
    }
    if (launch.mean_blocks > 0) {
      MeanTasks means = launch.means;
      means.sums = workspace;
      means.out = out;
      LPIPS_FAST_LAUNCH(mean_of_partial_sums<A>, launch.mean_blocks, kMeanThreads, stream, means);
    }
  }
}

// kTap: of a tap (channels_last_kernels.cuh), channels-last alone.
template <typename T, bool kTap = false, typename Stream>
void launch_backward(const Plan& plan, double eps, void* workspace, Stream stream) {
  using A = accumulator_t<T>;
  for (const Launch& launch : plan.launches) {
    LayerTasks tasks = launch.tasks;
    tasks.eps = eps;
    tasks.workspace = workspace;
    const bool weights = launch.weight_blocks > 0;
    if (launch.blocks > 0) {
      const auto run = [&](auto kernel) {
        LPIPS_FAST_LAUNCH(kernel, launch.blocks, launch.threads, stream, tasks);
      };
      const auto choose = [&](auto plain, auto with_weights) {
        run(weights ? with_weights : plain);
      };
      if (launch.order == MemoryOrder::kChannelsLast && launch.vectors) {
        choose(channels_last_backward<T, true, false, kTap>,
               channels_last_backward<T, true, true, kTap>);
      } else if (launch.order == MemoryOrder::kChannelsLast) {
        choose(channels_last_backward<T, false, false, kTap>,
               channels_last_backward<T, false, true, kTap>);
      } else if constexpr (kTap) {
        throw std::invalid_argument("lpips_fast: a tap's gradient is channels-last");
      } else if (launch.vectors) {
        choose(channels_first_backward<T, true, false>, channels_first_backward<T, true, true>);
      } else {
        choose(channels_first_backward<T, false, false>, channels_first_backward<T, false, true>);
      }
    }
    if (weights) {
      WeightTasks rows = launch.weights;
      rows.workspace = workspace;
      LPIPS_FAST_LAUNCH(sum_of_weight_rows<A>, launch.weight_blocks,
                        kWeightSumChannels * kWeightSumRows, stream, rows);
    }
  }
}

}  // namespace lpips_fast::cuda
