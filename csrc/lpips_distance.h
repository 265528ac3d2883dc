// The operator's contract, shared by its CPU and CUDA implementations: what is accepted, how it is
// described to a kernel, and how outputs are laid out. Python's fake kernels (lpips_fast/kernels)
// state the same layout rule for torch.compile.
//
//   distance(feats0, feats1, weights, eps) -> (N, L)
//   masked_distance(feats0, feats1, weights, position_weights, eps) -> (N, L)
//   distance_map(feats0, feats1, weights, eps) -> L maps of (N, 1, H_l, W_l)
//   *_backward(grad(s), ...) -> gradients, concatenated: feats0, then feats1, then weights
//
// Layer l has feats{0,1}[l] of shape (N, C_l, H_l, W_l) and weights[l] of shape (C_l,). A masked
// distance is the mean over positions of position_weights[l] * map, with one weight a position,
// (N, 1, H_l, W_l), or (1, 1, H_l, W_l) for all images; of weights whose mean is 1 a weighted
// average. Its gradient is that of the map, by distance_map_backward. Features are float32,
// float64, float16 or bfloat16; everything else has the accumulator's dtype.
#pragma once

#include <vector>

#include "allocation.h"
#include "checks.h"
#include "layer_view.h"

namespace lpips_fast {

// Checked before any pointer is taken: a kernel trusts every line below.
inline void check_layers(Backend backend, const TensorList& feats0, const TensorList& feats1,
                         const TensorList& weights) {
  LPIPS_FAST_CHECK(!feats0.empty(), "expected the features of at least one layer, got none");
  LPIPS_FAST_CHECK(feats0.size() == feats1.size() && feats0.size() == weights.size(),
                   "expected as many features as weights, got ", feats0.size(), ", ", feats1.size(),
                   " and ", weights.size());
  Operands(backend).check("feats0", feats0).check("feats1", feats1).check("weights", weights);
  const ScalarType dtype = feats0[0].scalar_type();
  LPIPS_FAST_CHECK(is_feature_dtype(dtype),
                   "features must be float32, float64, float16 or bfloat16, got ",
                   torch::headeronly::toString(dtype));
  for (size_t l = 0; l < feats0.size(); ++l) {
    const Tensor &a = feats0[l], &b = feats1[l], &w = weights[l];
    LPIPS_FAST_CHECK(a.dim() == 4, "layer ", l, ": features must be (N, C, H, W), got ",
                     shape_of(a));
    LPIPS_FAST_CHECK(same_shape(a, b), "layer ", l, ": the two features differ in shape, ",
                     shape_of(a), " and ", shape_of(b));
    LPIPS_FAST_CHECK(a.size(0) == feats0[0].size(0), "layer ", l, ": batch size ", a.size(0),
                     " differs from layer 0's ", feats0[0].size(0));
    LPIPS_FAST_CHECK(a.scalar_type() == dtype && b.scalar_type() == dtype, "layer ", l,
                     ": all features must share one dtype, got ",
                     torch::headeronly::toString(a.scalar_type()), " and ",
                     torch::headeronly::toString(b.scalar_type()), " beside ",
                     torch::headeronly::toString(dtype));
    LPIPS_FAST_CHECK(has_shape(w, {a.size(1)}), "layer ", l, ": weight must be (", a.size(1),
                     ",), one per channel, got ", shape_of(w));
    LPIPS_FAST_CHECK(w.scalar_type() == accumulator_dtype(dtype), "layer ", l,
                     ": weight must have the accumulator's dtype ",
                     torch::headeronly::toString(accumulator_dtype(dtype)), ", got ",
                     torch::headeronly::toString(w.scalar_type()));
  }
}

inline void check_distance_gradient(Backend backend, const Tensor& grad, const TensorList& feats0) {
  Operands(backend).check("feats0", feats0[0]).check("gradient of the distance", grad);
  LPIPS_FAST_CHECK(has_shape(grad, {feats0[0].size(0), static_cast<int64_t>(feats0.size())}) &&
                       grad.scalar_type() == accumulator_dtype(feats0[0].scalar_type()),
                   "gradient of the distance must be (N, L) in the accumulator's dtype, got ",
                   description_of(grad));
}

inline void check_position_weights(Backend backend, const TensorList& position_weights,
                                   const TensorList& feats0) {
  LPIPS_FAST_CHECK(position_weights.size() == feats0.size(),
                   "expected the position weights of every layer, got ", position_weights.size(),
                   " for ", feats0.size(), " layers");
  Operands(backend).check("feats0", feats0[0]).check("position weights", position_weights);
  for (size_t l = 0; l < feats0.size(); ++l) {
    const Tensor &p = position_weights[l], &f = feats0[l];
    LPIPS_FAST_CHECK(
        (has_shape(p, {f.size(0), 1, f.size(2), f.size(3)}) ||
         has_shape(p, {1, 1, f.size(2), f.size(3)})) &&
            p.scalar_type() == accumulator_dtype(f.scalar_type()),
        "layer ", l,
        ": position weights must be (N or 1, 1, H, W) in the accumulator's dtype, got ",
        description_of(p));
  }
}

inline void check_map_gradients(Backend backend, const TensorList& grads,
                                const TensorList& feats0) {
  LPIPS_FAST_CHECK(grads.size() == feats0.size(), "expected one map gradient per layer, got ",
                   grads.size(), " for ", feats0.size(), " layers");
  Operands(backend).check("feats0", feats0[0]).check("gradient of the map", grads);
  for (size_t l = 0; l < grads.size(); ++l) {
    const Tensor &g = grads[l], &f = feats0[l];
    LPIPS_FAST_CHECK(has_shape(g, {f.size(0), 1, f.size(2), f.size(3)}) &&
                         g.scalar_type() == accumulator_dtype(f.scalar_type()),
                     "layer ", l,
                     ": gradient of the map must be (N, 1, H, W) in the accumulator's dtype, got ",
                     description_of(g));
  }
}

// The layout rule, in one line: a layer runs channels-last where feats0's channel stride is 1, and
// channels-first otherwise. Gradients come out densely in the order that the layer ran in.
inline MemoryOrder memory_order(const Tensor& feat0) {
  return feat0.stride(1) == 1 ? MemoryOrder::kChannelsLast : MemoryOrder::kChannelsFirst;
}

inline MemoryFormat memory_format(MemoryOrder order) {
  return order == MemoryOrder::kChannelsLast ? MemoryFormat::ChannelsLast
                                             : MemoryFormat::Contiguous;
}

// The one place where a feature is copied: it lies in neither order, or in another than feats0.
inline Tensor in_order(const Tensor& feat, MemoryOrder order) {
  const int64_t dense_dim = order == MemoryOrder::kChannelsLast ? 1 : 3;
  if (feat.stride(dense_dim) == 1 || feat.size(dense_dim) == 1) return feat;
  return dense(feat, memory_format(order));
}

// torch leaves the stride of a dimension of size 1 open; kernels may rely on the dense one being 1.
inline FeatureView view_of(const Tensor& t, MemoryOrder order) {
  const bool channels_last = order == MemoryOrder::kChannelsLast;
  return {t.const_data_ptr(), t.stride(0), channels_last ? 1 : t.stride(1), t.stride(2),
          channels_last ? t.stride(3) : 1};
}

inline GradientView gradient_view_of(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// The layers of one call, with the tensors that keep copied features and weights alive.
struct Layers {
  std::vector<LayerView> views;
  TensorList owned;
};

inline Layers describe_layers(const TensorList& feats0, const TensorList& feats1,
                              const TensorList& weights) {
  Layers layers;
  for (size_t l = 0; l < feats0.size(); ++l) {
    const MemoryOrder order = memory_order(feats0[l]);
    const Tensor a = in_order(feats0[l], order), b = in_order(feats1[l], order);
    const Tensor w = dense(weights[l]);
    layers.views.push_back({a.size(0), a.size(1), a.size(2), a.size(3), order, view_of(a, order),
                            view_of(b, order), w.const_data_ptr()});
    layers.owned.insert(layers.owned.end(), {a, b, w});
  }
  return layers;
}

// Weights of positions as a kernel reads them: for an image a line of H*W numbers.
struct PositionWeights {
  TensorList owned;  // keeps copied ones alive

  PositionWeights() = default;
  explicit PositionWeights(const TensorList& given) {
    for (const Tensor& p : given) owned.push_back(dense(p));
  }

  const void* data(size_t l) const { return owned[l].const_data_ptr(); }
  // From an image's to the next's; 0 where one line is for all.
  int64_t stride_n(size_t l) const {
    return owned[l].size(0) == 1 ? 0 : owned[l].size(2) * owned[l].size(3);
  }
};

inline Tensor empty_gradient(const Tensor& feat, MemoryOrder order) {
  const auto sizes = feat.sizes();
  return empty({sizes.begin(), sizes.end()}, feat.scalar_type(), feat.device(),
               memory_format(order));
}

inline Tensor empty_accumulators(const std::vector<int64_t>& shape, const Tensor& feat) {
  return empty(shape, accumulator_dtype(feat.scalar_type()), feat.device());
}

}  // namespace lpips_fast
