// The CUDA implementation of the distance, torch's side: outputs, workspace, launches.
#include <array>
#include <atomic>
#include <optional>

#include "../lpips_distance.h"
#include "distance_kernels.cuh"
#include "torch_side.h"

namespace lpips_fast::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

int multiprocessors(int32_t device) {
  static std::array<std::atomic<int>, 64> known{};
  const bool in_table = device >= 0 && device < static_cast<int32_t>(known.size());
  int count = in_table ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (in_table) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// Partial sums' memory, from torch's allocator: ordered by the current stream, capturable.
struct Workspace {
  Tensor memory;
  void* data = nullptr;

  Workspace(const Plan& plan, const Tensor& feat) {
    if (plan.workspace == 0) return;
    memory = empty_accumulators({plan.workspace}, feat);
    data = memory.mutable_data_ptr();
  }
};

std::vector<LayerWork> works_of(const Layers& layers) {
  std::vector<LayerWork> works;
  for (const LayerView& layer : layers.views) works.push_back({layer});
  return works;
}

void run_distance(Operation operation, const std::vector<LayerWork>& works, const Tensor& feat,
                  double eps, void* out) {
  const int32_t device = feat.get_device_index();
  const Plan plan =
      plan_call(operation, works, static_cast<int>(feat.element_size()), multiprocessors(device));
  const Workspace workspace(plan, feat);
  dispatch_feature_dtype(feat.scalar_type(), [&](auto feature) {
    launch_distance<decltype(feature)>(plan, eps, workspace.data, out, current_stream(device));
  });
  check(cudaGetLastError());
}

// `position_weights`: of every layer, or none at all.
Tensor averages(const TensorList& feats0, const TensorList& feats1, const TensorList& weights,
                const TensorList& position_weights, double eps) {
  const DeviceGuard guard(feats0[0].get_device_index());
  const Layers layers = describe_layers(feats0, feats1, weights);
  const PositionWeights of_positions(position_weights);
  std::vector<LayerWork> works = works_of(layers);
  for (size_t l = 0; l < of_positions.owned.size(); ++l)
    works[l].position_weight = {of_positions.data(l), of_positions.stride_n(l)};
  const Tensor out =
      empty_accumulators({feats0[0].size(0), static_cast<int64_t>(feats0.size())}, feats0[0]);
  run_distance(Operation::kAverage, works, feats0[0], eps, out.mutable_data_ptr());
  return out;
}

Tensor distance(TensorList feats0, TensorList feats1, TensorList weights, double eps) {
  check_layers(Backend::kCUDA, feats0, feats1, weights);
  return averages(feats0, feats1, weights, {}, eps);
}

Tensor masked_distance(TensorList feats0, TensorList feats1, TensorList weights,
                       TensorList position_weights, double eps) {
  check_layers(Backend::kCUDA, feats0, feats1, weights);
  check_position_weights(Backend::kCUDA, position_weights, feats0);
  return averages(feats0, feats1, weights, position_weights, eps);
}

TensorList distance_map(TensorList feats0, TensorList feats1, TensorList weights, double eps) {
  check_layers(Backend::kCUDA, feats0, feats1, weights);
  const DeviceGuard guard(feats0[0].get_device_index());
  const Layers layers = describe_layers(feats0, feats1, weights);
  std::vector<LayerWork> works = works_of(layers);
  TensorList maps;
  for (LayerWork& work : works) {
    maps.push_back(empty_accumulators({work.layer.n, 1, work.layer.h, work.layer.w}, feats0[0]));
    work.map = maps.back().mutable_data_ptr();
  }
  run_distance(Operation::kMap, works, feats0[0], eps, nullptr);
  return maps;
}

// Allocates what is asked for, runs, and returns it in the contract's order. `works` have their
// upstream gradients. kTap: one layer's, of a tap.
template <bool kTap = false>
TensorList run_backward(std::vector<LayerWork> works, const TensorList& feats0,
                        const TensorList& weights, double eps, bool need_feats0, bool need_feats1,
                        bool need_weights) {
  TensorList grads0, grads1, grads_weight;
  for (size_t l = 0; l < works.size(); ++l) {
    LayerWork& work = works[l];
    if (need_feats0) {
      grads0.push_back(empty_gradient(feats0[l], work.layer.order));
      work.grad0 = gradient_view_of(grads0.back());
    }
    if (need_feats1) {
      grads1.push_back(empty_gradient(feats0[l], work.layer.order));
      work.grad1 = gradient_view_of(grads1.back());
    }
    if (need_weights) {
      grads_weight.push_back(empty_accumulators({weights[l].size(0)}, feats0[l]));
      work.grad_weight = grads_weight.back().mutable_data_ptr();
    }
  }
  if (need_feats0 || need_feats1 || need_weights) {
    const int32_t device = feats0[0].get_device_index();
    const Plan plan =
        plan_call(Operation::kBackward, works, static_cast<int>(feats0[0].element_size()),
                  multiprocessors(device));
    const Workspace workspace(plan, feats0[0]);
    dispatch_feature_dtype(feats0[0].scalar_type(), [&](auto feature) {
      launch_backward<decltype(feature), kTap>(plan, eps, workspace.data, current_stream(device));
    });
    check(cudaGetLastError());
  }
  TensorList all = grads0;
  all.insert(all.end(), grads1.begin(), grads1.end());
  all.insert(all.end(), grads_weight.begin(), grads_weight.end());
  return all;
}

TensorList distance_backward(Tensor grad, TensorList feats0, TensorList feats1, TensorList weights,
                             double eps, bool need_feats0, bool need_feats1, bool need_weights) {
  check_layers(Backend::kCUDA, feats0, feats1, weights);
  check_distance_gradient(Backend::kCUDA, grad, feats0);
  const DeviceGuard guard(feats0[0].get_device_index());
  const Layers layers = describe_layers(feats0, feats1, weights);
  std::vector<LayerWork> works = works_of(layers);
  const size_t step = static_cast<size_t>(grad.stride(1)) * grad.element_size();
  for (size_t l = 0; l < works.size(); ++l) {
    works[l].upstream = {static_cast<const char*>(grad.const_data_ptr()) + l * step, grad.stride(0),
                         0, 0};
    works[l].upstream_scale = 1.0 / static_cast<double>(works[l].layer.h * works[l].layer.w);
  }
  return run_backward(works, feats0, weights, eps, need_feats0, need_feats1, need_weights);
}

TensorList distance_map_backward(TensorList grads, TensorList feats0, TensorList feats1,
                                 TensorList weights, double eps, bool need_feats0, bool need_feats1,
                                 bool need_weights) {
  check_layers(Backend::kCUDA, feats0, feats1, weights);
  check_map_gradients(Backend::kCUDA, grads, feats0);
  const DeviceGuard guard(feats0[0].get_device_index());
  const Layers layers = describe_layers(feats0, feats1, weights);
  std::vector<LayerWork> works = works_of(layers);
  for (size_t l = 0; l < works.size(); ++l)
    works[l].upstream = {grads[l].const_data_ptr(), grads[l].stride(0), grads[l].stride(2),
                         grads[l].stride(3)};
  return run_backward(works, feats0, weights, eps, need_feats0, need_feats1, need_weights);
}

// The gradient at a tap of a network, as csrc/cpu/distance_cpu.cpp has it: the distance's to feat0,
// with what comes from deeper layers, through the ReLU whose result feat0 is. `grad` is (N, 1), to
// a distance, or (N, 1, H, W), to a map.
TensorList tap_backward(Tensor grad, std::optional<Tensor> deeper, Tensor feat0, Tensor feat1,
                        Tensor weight, double eps, bool need_weight) {
  const TensorList feats0{feat0}, weights{weight};
  check_layers(Backend::kCUDA, feats0, {feat1}, weights);
  const bool is_map = grad.dim() == 4;
  if (is_map) {
    check_map_gradients(Backend::kCUDA, {grad}, feats0);
  } else {
    check_distance_gradient(Backend::kCUDA, grad, feats0);
  }
  Operands(Backend::kCUDA).check("feat0", feat0).check("the gradient from deeper layers", deeper);
  LPIPS_FAST_CHECK(memory_order(feat0) == MemoryOrder::kChannelsLast,
                   "tap_backward takes channels-last features; call "
                   ".contiguous(memory_format=torch.channels_last) first");
  LPIPS_FAST_CHECK(
      !deeper || (same_shape(*deeper, feat0) && deeper->scalar_type() == feat0.scalar_type()),
      "the gradient from deeper layers must have the features' shape and dtype, got ",
      deeper ? description_of(*deeper) : "", " for ", description_of(feat0));
  const DeviceGuard guard(feat0.get_device_index());
  const Layers layers = describe_layers(feats0, {feat1}, weights);
  LayerWork work = works_of(layers)[0];
  const int64_t positions = work.layer.h * work.layer.w;
  if (is_map) {
    work.upstream = {grad.const_data_ptr(), grad.stride(0), grad.stride(2), grad.stride(3)};
  } else {
    work.upstream = {grad.const_data_ptr(), grad.stride(0), 0, 0};
    work.upstream_scale = 1.0 / static_cast<double>(positions);
  }
  if (deeper) {
    deeper = in_order(*deeper, MemoryOrder::kChannelsLast);
    work.deeper = view_of(*deeper, MemoryOrder::kChannelsLast);
  }
  return run_backward<true>({work}, feats0, weights, eps, true, false, need_weight);
}

}  // namespace
}  // namespace lpips_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CUDA, m) {
  m.impl("distance", TORCH_BOX(&lpips_fast::cuda::distance));
  m.impl("distance_backward", TORCH_BOX(&lpips_fast::cuda::distance_backward));
  m.impl("masked_distance", TORCH_BOX(&lpips_fast::cuda::masked_distance));
  m.impl("distance_map", TORCH_BOX(&lpips_fast::cuda::distance_map));
  m.impl("distance_map_backward", TORCH_BOX(&lpips_fast::cuda::distance_map_backward));
  m.impl("tap_backward", TORCH_BOX(&lpips_fast::cuda::tap_backward));
}
