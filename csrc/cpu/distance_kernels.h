// The CPU kernels: the distance and its gradient over a run of positions, that is, over
// neighbouring positions with a constant stride between them. Free of torch: pointers and strides.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../layer_view.h"

namespace lpips_fast {

template <typename feature_t>
using accumulator_t = std::conditional_t<std::is_same_v<feature_t, double>, double, float>;

// Where a run of positions lies in one tensor. Strides are in elements; the one along which the
// memory order is dense is taken to be 1.
template <typename pointer_t>
struct Run {
  pointer_t data;
  int64_t channel_stride, position_stride;
};

template <typename feature_t>
struct ForwardRun {
  Run<const feature_t*> a, b;
  const accumulator_t<feature_t>* weight;  // (C,)
  accumulator_t<feature_t>* distance;      // one per position
};

template <typename feature_t>
struct BackwardRun {
  Run<const feature_t*> a, b;
  const accumulator_t<feature_t>* weight;  // (C,)
  const accumulator_t<feature_t>* grad;    // dL/dd, one per position
  Run<feature_t*> grad_a, grad_b;          // data is null where the gradient is not asked for
  accumulator_t<feature_t>* grad_weight;   // (C,), added to; null where not asked for
  // Channels-last only: what else `a` passes on, added to its gradient (null: nothing); and whether
  // `a` is the result of a ReLU, the gradient to whose argument is asked for.
  Run<const feature_t*> deeper{nullptr, 0, 0};
  bool through_relu = false;
};

// Instantiated for float, double, c10::Half and c10::BFloat16.
template <typename feature_t>
void distance_run(const ForwardRun<feature_t>& run, MemoryOrder order, int64_t channels,
                  int64_t positions, double eps);
template <typename feature_t>
void distance_backward_run(const BackwardRun<feature_t>& run, MemoryOrder order, int64_t channels,
                           int64_t positions, double eps);

}  // namespace lpips_fast
