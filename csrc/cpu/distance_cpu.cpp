// The CPU implementation of the operator: work division, reductions, registration.
//
// A layer's positions are cut into chunks of a size that depends on its shape alone, never on the
// number of threads. Each chunk leaves one partial sum, and partial sums are added in order: the
// same bits come out whatever the number of threads.
//
// setup.py builds this file once per CPU capability (default, AVX2, AVX512) as a library of its
// own; lpips_fast/kernels/libraries.py loads the one that torch itself would use on the machine.
#include <algorithm>
#include <optional>
#include <vector>

#include "../lpips_distance.h"
#include "dispatch.h"
#include "distance_kernels.h"
#include "parallel.h"

namespace lpips_fast {
namespace {

// Enough work to outweigh waking a thread, little enough to balance; its distances fit the stack.
constexpr int64_t kElementsPerChunk = 32 * 1024;
constexpr int64_t kMaxPositionsPerChunk = 1024;

struct Chunks {
  int64_t positions, per_image, total;

  explicit Chunks(const LayerView& layer) {
    const int64_t in_image = layer.h * layer.w;
    positions = std::clamp<int64_t>(kElementsPerChunk / std::max<int64_t>(layer.c, 1), 64,
                                    kMaxPositionsPerChunk);
    per_image = (in_image + positions - 1) / positions;
    total = layer.n * per_image;
  }
};

bool rows_adjoin(const LayerView& layer) {
  const auto adjoin = [&](const FeatureView& f) { return f.stride_h == layer.w * f.stride_w; };
  return layer.h == 1 || (adjoin(layer.feat0) && adjoin(layer.feat1));
}

// visit(row, column, count, position) for the runs of one chunk: the whole chunk where rows adjoin
// in memory, else one run per row.
template <typename Visit>
void for_each_run(const LayerView& layer, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t width = rows_adjoin(layer) ? layer.h * layer.w : layer.w;
  for (int64_t p = begin; p < end;) {
    const int64_t column = p % width, count = std::min(width - column, end - p);
    visit(p / width, column, count, p);
    p += count;
  }
}

template <typename pointer_t, typename View>
Run<pointer_t> run_at(const View& view, int64_t image, int64_t row, int64_t column) {
  if (!view.data) return {nullptr, 0, 0};
  return {static_cast<pointer_t>(view.data) + image * view.stride_n + row * view.stride_h +
              column * view.stride_w,
          view.stride_c, view.stride_w};
}

template <typename Visit>
void for_each_chunk(const LayerView& layer, const Visit& visit) {
  const Chunks chunks(layer);
  const int64_t in_image = layer.h * layer.w;
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerChunk / std::max<int64_t>(1, chunks.positions * layer.c));
  parallel_for(0, chunks.total, grain, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t image = chunk / chunks.per_image;
      const int64_t begin = chunk % chunks.per_image * chunks.positions;
      visit(chunk, image, begin, std::min(begin + chunks.positions, in_image));
    }
  });
}

template <typename feature_t>
void distances_of_chunk(const LayerView& layer, int64_t image, int64_t begin, int64_t end,
                        double eps, accumulator_t<feature_t>* out) {
  using acc_t = accumulator_t<feature_t>;
  for_each_run(layer, begin, end, [&](int64_t row, int64_t column, int64_t count, int64_t p) {
    const ForwardRun<feature_t> run{run_at<const feature_t*>(layer.feat0, image, row, column),
                                    run_at<const feature_t*>(layer.feat1, image, row, column),
                                    static_cast<const acc_t*>(layer.weight), out + (p - begin)};
    distance_run(run, layer.order, layer.c, count, eps);
  });
}

// A weight for every position, in lines of H*W: `data` null where all count alike.
struct PositionWeightView {
  const void* data = nullptr;
  int64_t image_stride = 0;
};

// out[image * out_stride] = mean of the distances of an image, each times its position's weight.
// The weights meet the distances in a chunk's sum, in double as these: so weights of 1 leave every
// bit as it is, and the kernels know nothing of them.
template <typename feature_t>
void average(const LayerView& layer, double eps, const PositionWeightView& weights,
             accumulator_t<feature_t>* out, int64_t out_stride) {
  using acc_t = accumulator_t<feature_t>;
  const Chunks chunks(layer);
  if (layer.c == 0) {  // nothing to sum at however many positions
    for (int64_t image = 0; image < layer.n; ++image)
      out[image * out_stride] = static_cast<acc_t>(0.0 / static_cast<double>(layer.h * layer.w));
    return;
  }
  std::vector<double> partial = zeros<double>(chunks.total);
  for_each_chunk(layer, [&](int64_t chunk, int64_t image, int64_t begin, int64_t end) {
    acc_t distance[kMaxPositionsPerChunk];
    distances_of_chunk<feature_t>(layer, image, begin, end, eps, distance);
    double sum = 0;
    if (weights.data) {
      const acc_t* weight =
          static_cast<const acc_t*>(weights.data) + image * weights.image_stride + begin;
      for (int64_t p = 0; p < end - begin; ++p)
        sum += static_cast<double>(distance[p]) * static_cast<double>(weight[p]);
    } else {
      for (int64_t p = 0; p < end - begin; ++p) sum += distance[p];
    }
    partial[chunk] = sum;
  });
  for (int64_t image = 0; image < layer.n; ++image) {
    double sum = 0;
    for (int64_t k = 0; k < chunks.per_image; ++k) sum += partial[image * chunks.per_image + k];
    // 0/0 = NaN for an image without positions, as torch.mean has it.
    out[image * out_stride] = static_cast<acc_t>(sum / static_cast<double>(layer.h * layer.w));
  }
}

template <typename feature_t>
void map(const LayerView& layer, double eps, accumulator_t<feature_t>* out) {
  for_each_chunk(layer, [&](int64_t, int64_t image, int64_t begin, int64_t end) {
    distances_of_chunk<feature_t>(layer, image, begin, end, eps,
                                  out + image * layer.h * layer.w + begin);
  });
}

// dL/dd of each position: one number per image for an averaged distance (position_stride 0, scaled
// by 1/(H*W)), one per position for a map.
struct DistanceGradient {
  const void* data;
  int64_t image_stride, position_stride;
  double scale;
};

struct LayerGradients {
  GradientView feat0, feat1;
  void* weight;
  FeatureView deeper{nullptr, 0, 0, 0, 0};
  bool through_relu = false;
};

template <typename feature_t>
void backward(const LayerView& layer, double eps, const DistanceGradient& grad,
              const LayerGradients& out) {
  using acc_t = accumulator_t<feature_t>;
  if (layer.c == 0) return;
  const Chunks chunks(layer);
  std::vector<acc_t> partial_weight = zeros<acc_t>(out.weight ? chunks.total * layer.c : 0);
  for_each_chunk(layer, [&](int64_t chunk, int64_t image, int64_t begin, int64_t end) {
    acc_t position_grad[kMaxPositionsPerChunk];
    const acc_t* image_grad = static_cast<const acc_t*>(grad.data) + image * grad.image_stride;
    for (int64_t p = begin; p < end; ++p)
      position_grad[p - begin] =
          static_cast<acc_t>(image_grad[p * grad.position_stride] * grad.scale);
    for_each_run(layer, begin, end, [&](int64_t row, int64_t column, int64_t count, int64_t p) {
      // Gradients are dense, so a position's row and column say where it lies even where the run
      // spans rows (rows_adjoin: row 0, column = position).
      const BackwardRun<feature_t> run{
          run_at<const feature_t*>(layer.feat0, image, row, column),
          run_at<const feature_t*>(layer.feat1, image, row, column),
          static_cast<const acc_t*>(layer.weight),
          position_grad + (p - begin),
          run_at<feature_t*>(out.feat0, image, row, column),
          run_at<feature_t*>(out.feat1, image, row, column),
          out.weight ? partial_weight.data() + chunk * layer.c : nullptr,
          run_at<const feature_t*>(out.deeper, image, row, column),
          out.through_relu};
      distance_backward_run(run, layer.order, layer.c, count, eps);
    });
  });
  if (!out.weight) return;
  acc_t* grad_weight = static_cast<acc_t*>(out.weight);
  for (int64_t c = 0; c < layer.c; ++c) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks.total; ++chunk)
      sum += partial_weight[chunk * layer.c + c];
    grad_weight[c] = static_cast<acc_t>(sum);
  }
}

// `position_weights`: of every layer, or none at all.
Tensor averages(const TensorList& feats0, const TensorList& feats1, const TensorList& weights,
                const PositionWeights& position_weights, double eps) {
  const Layers layers = describe_layers(feats0, feats1, weights);
  const auto count = static_cast<int64_t>(feats0.size());
  const Tensor out = empty_accumulators({feats0[0].size(0), count}, feats0[0]);
  dispatch_feature_dtype(feats0[0].scalar_type(), [&](auto feature) {
    using feature_t = decltype(feature);
    auto* first = static_cast<accumulator_t<feature_t>*>(out.mutable_data_ptr());
    for (int64_t l = 0; l < count; ++l) {
      PositionWeightView of_layer;
      if (!position_weights.owned.empty())
        of_layer = {position_weights.data(l), position_weights.stride_n(l)};
      average<feature_t>(layers.views[l], eps, of_layer, first + l, count);
    }
  });
  return out;
}

Tensor distance(TensorList feats0, TensorList feats1, TensorList weights, double eps) {
  check_layers(Backend::kCPU, feats0, feats1, weights);
  return averages(feats0, feats1, weights, {}, eps);
}

Tensor masked_distance(TensorList feats0, TensorList feats1, TensorList weights,
                       TensorList position_weights, double eps) {
  check_layers(Backend::kCPU, feats0, feats1, weights);
  check_position_weights(Backend::kCPU, position_weights, feats0);
  return averages(feats0, feats1, weights, PositionWeights(position_weights), eps);
}

TensorList distance_map(TensorList feats0, TensorList feats1, TensorList weights, double eps) {
  check_layers(Backend::kCPU, feats0, feats1, weights);
  const Layers layers = describe_layers(feats0, feats1, weights);
  TensorList maps;
  for (const LayerView& layer : layers.views) {
    maps.push_back(empty_accumulators({layer.n, 1, layer.h, layer.w}, feats0[0]));
    dispatch_feature_dtype(feats0[0].scalar_type(), [&](auto feature) {
      using feature_t = decltype(feature);
      map<feature_t>(layer, eps,
                     static_cast<accumulator_t<feature_t>*>(maps.back().mutable_data_ptr()));
    });
  }
  return maps;
}

// The gradients of one call, in the order in which they are returned.
struct Gradients {
  TensorList feats0, feats1, weights;

  Gradients(const TensorList& feats, const TensorList& layer_weights, const Layers& layers,
            bool need_feats0, bool need_feats1, bool need_weights) {
    for (size_t l = 0; l < feats.size(); ++l) {
      const MemoryOrder order = layers.views[l].order;
      if (need_feats0) feats0.push_back(empty_gradient(feats[l], order));
      if (need_feats1) feats1.push_back(empty_gradient(feats[l], order));
      if (need_weights) weights.push_back(empty_accumulators({layer_weights[l].size(0)}, feats[l]));
    }
  }

  LayerGradients layer(size_t l) const {
    const GradientView none{nullptr, 0, 0, 0, 0};
    return {feats0.empty() ? none : gradient_view_of(feats0[l]),
            feats1.empty() ? none : gradient_view_of(feats1[l]),
            weights.empty() ? nullptr : weights[l].mutable_data_ptr()};
  }

  TensorList concatenated() const {
    TensorList all = feats0;
    all.insert(all.end(), feats1.begin(), feats1.end());
    all.insert(all.end(), weights.begin(), weights.end());
    return all;
  }
};

TensorList distance_backward(Tensor grad, TensorList feats0, TensorList feats1, TensorList weights,
                             double eps, bool need_feats0, bool need_feats1, bool need_weights) {
  check_layers(Backend::kCPU, feats0, feats1, weights);
  check_distance_gradient(Backend::kCPU, grad, feats0);
  const Layers layers = describe_layers(feats0, feats1, weights);
  const Gradients out(feats0, weights, layers, need_feats0, need_feats1, need_weights);
  dispatch_feature_dtype(feats0[0].scalar_type(), [&](auto feature) {
    using feature_t = decltype(feature);
    const auto* first = static_cast<const accumulator_t<feature_t>*>(grad.const_data_ptr());
    for (size_t l = 0; l < feats0.size(); ++l) {
      const LayerView& layer = layers.views[l];
      backward<feature_t>(layer, eps,
                          {first + static_cast<int64_t>(l) * grad.stride(1), grad.stride(0), 0,
                           1.0 / static_cast<double>(layer.h * layer.w)},
                          out.layer(l));
    }
  });
  return out.concatenated();
}

TensorList distance_map_backward(TensorList grads, TensorList feats0, TensorList feats1,
                                 TensorList weights, double eps, bool need_feats0, bool need_feats1,
                                 bool need_weights) {
  check_layers(Backend::kCPU, feats0, feats1, weights);
  check_map_gradients(Backend::kCPU, grads, feats0);
  const Layers layers = describe_layers(feats0, feats1, weights);
  const Gradients out(feats0, weights, layers, need_feats0, need_feats1, need_weights);
  dispatch_feature_dtype(feats0[0].scalar_type(), [&](auto feature) {
    using feature_t = decltype(feature);
    for (size_t l = 0; l < feats0.size(); ++l) {
      const LayerView& layer = layers.views[l];
      const Tensor grad = dense(grads[l]);
      backward<feature_t>(layer, eps, {grad.const_data_ptr(), layer.h * layer.w, 1, 1.0},
                          out.layer(l));
    }
  });
  return out.concatenated();
}

// Everything that meets at a tap of a network, in one pass instead of three: the distance's
// gradient to feat0, the one that comes from deeper layers, and the derivative of the ReLU whose
// result feat0 is. `grad` is (N, 1), to a distance, or (N, 1, H, W), to a map.
TensorList tap_backward(Tensor grad, std::optional<Tensor> deeper, Tensor feat0, Tensor feat1,
                        Tensor weight, double eps, bool need_weight) {
  const TensorList feats0{feat0}, weights{weight};
  check_layers(Backend::kCPU, feats0, {feat1}, weights);
  const bool is_map = grad.dim() == 4;
  if (is_map) {
    check_map_gradients(Backend::kCPU, {grad}, feats0);
    grad = dense(grad);
  } else {
    check_distance_gradient(Backend::kCPU, grad, feats0);
  }
  const Layers layers = describe_layers(feats0, {feat1}, weights);
  const LayerView& layer = layers.views[0];
  Operands(Backend::kCPU).check("the gradient from deeper layers", deeper);
  LPIPS_FAST_CHECK(layer.order == MemoryOrder::kChannelsLast,
                   "tap_backward takes channels-last features; call "
                   ".contiguous(memory_format=torch.channels_last) first");
  LPIPS_FAST_CHECK(
      !deeper || (same_shape(*deeper, feat0) && deeper->scalar_type() == feat0.scalar_type()),
      "the gradient from deeper layers must have the features' shape and dtype, got ",
      deeper ? description_of(*deeper) : "", " for ", description_of(feat0));
  const Gradients out(feats0, weights, layers, true, false, need_weight);
  LayerGradients of_layer = out.layer(0);
  of_layer.through_relu = true;
  if (deeper) {
    // Dense, as the gradient is: a run may span rows.
    deeper = dense(*deeper, MemoryFormat::ChannelsLast);
    of_layer.deeper = {deeper->const_data_ptr(), layer.h * layer.w * layer.c, 1, layer.w * layer.c,
                       layer.c};
  }
  const double positions = static_cast<double>(layer.h * layer.w);
  const DistanceGradient of_distance =
      is_map ? DistanceGradient{grad.const_data_ptr(), layer.h * layer.w, 1, 1.0}
             : DistanceGradient{grad.const_data_ptr(), grad.stride(0), 0, 1.0 / positions};
  dispatch_feature_dtype(feat0.scalar_type(), [&](auto feature) {
    backward<decltype(feature)>(layer, eps, of_distance, of_layer);
  });
  return out.concatenated();
}

}  // namespace
}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("distance", TORCH_BOX(&lpips_fast::distance));
  m.impl("distance_backward", TORCH_BOX(&lpips_fast::distance_backward));
  m.impl("masked_distance", TORCH_BOX(&lpips_fast::masked_distance));
  m.impl("distance_map", TORCH_BOX(&lpips_fast::distance_map));
  m.impl("distance_map_backward", TORCH_BOX(&lpips_fast::distance_map_backward));
  m.impl("tap_backward", TORCH_BOX(&lpips_fast::tap_backward));
}
