// The operator's contract, shared by its CPU and CUDA implementations: what is accepted, how it is
// described to a kernel, and how outputs are laid out. Python's fake kernels (lpips_fast/kernels)
// state the same layout rule for torch.compile.
//
//   distance(feats0, feats1, weights, eps) -> (N, L)
//   distance_map(feats0, feats1, weights, eps) -> L maps of (N, 1, H_l, W_l)
//   *_backward(grad(s), ...) -> gradients, concatenated: feats0, then feats1, then weights
//
// Layer l has feats{0,1}[l] of shape (N, C_l, H_l, W_l) and weights[l] of shape (C_l,).
// Features are float32, float64, float16 or bfloat16; everything else has the accumulator's dtype.
#pragma once

#include <string>
#include <vector>

#include "layer_view.h"
#include "stable_abi.h"

namespace lpips_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

inline ScalarType accumulator_dtype(ScalarType feature_dtype) {
  return feature_dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// Checked before any pointer is taken: a kernel trusts every line below.
inline void check_layers(const TensorList& feats0, const TensorList& feats1,
                         const TensorList& weights) {
  STD_TORCH_CHECK(!feats0.empty(), "expected the features of at least one layer, got none");
  STD_TORCH_CHECK(feats0.size() == feats1.size() && feats0.size() == weights.size(),
                  "expected as many features as weights, got ", feats0.size(), ", ", feats1.size(),
                  " and ", weights.size());
  const ScalarType dtype = feats0[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "features must be float32, float64, float16 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
  for (size_t l = 0; l < feats0.size(); ++l) {
    const Tensor &a = feats0[l], &b = feats1[l], &w = weights[l];
    STD_TORCH_CHECK(a.dim() == 4, "layer ", l, ": features must be (N, C, H, W), got ",
                    shape_of(a));
    STD_TORCH_CHECK(same_shape(a, b), "layer ", l, ": the two features differ in shape, ",
                    shape_of(a), " and ", shape_of(b));
    STD_TORCH_CHECK(a.size(0) == feats0[0].size(0), "layer ", l, ": batch size ", a.size(0),
                    " differs from layer 0's ", feats0[0].size(0));
    STD_TORCH_CHECK(a.scalar_type() == dtype && b.scalar_type() == dtype, "layer ", l,
                    ": all features must share one dtype, got ",
                    torch::headeronly::toString(a.scalar_type()), " and ",
                    torch::headeronly::toString(b.scalar_type()), " beside ",
                    torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(w.dim() == 1 && w.size(0) == a.size(1), "layer ", l, ": weight must be (",
                    a.size(1), ",), one per channel, got ", shape_of(w));
    STD_TORCH_CHECK(w.scalar_type() == accumulator_dtype(dtype), "layer ", l,
                    ": weight must have the accumulator's dtype ",
                    torch::headeronly::toString(accumulator_dtype(dtype)), ", got ",
                    torch::headeronly::toString(w.scalar_type()));
    STD_TORCH_CHECK(
        same_device(a, feats0[0]) && same_device(b, feats0[0]) && same_device(w, feats0[0]),
        "layer ", l, ": features and weights must be on one device");
  }
}

inline void check_distance_gradient(const Tensor& grad, const TensorList& feats0) {
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == feats0[0].size(0) &&
          grad.size(1) == static_cast<int64_t>(feats0.size()) &&
          grad.scalar_type() == accumulator_dtype(feats0[0].scalar_type()) &&
          same_device(grad, feats0[0]),
      "gradient of the distance must be (N, L) in the accumulator's dtype on the features' "
      "device, got ",
      shape_of(grad), " ", torch::headeronly::toString(grad.scalar_type()));
}

inline void check_map_gradients(const TensorList& grads, const TensorList& feats0) {
  STD_TORCH_CHECK(grads.size() == feats0.size(), "expected one map gradient per layer, got ",
                  grads.size(), " for ", feats0.size(), " layers");
  for (size_t l = 0; l < grads.size(); ++l) {
    const Tensor &g = grads[l], &f = feats0[l];
    STD_TORCH_CHECK(g.dim() == 4 && g.size(0) == f.size(0) && g.size(1) == 1 &&
                        g.size(2) == f.size(2) && g.size(3) == f.size(3) &&
                        g.scalar_type() == accumulator_dtype(f.scalar_type()) && same_device(g, f),
                    "layer ", l,
                    ": gradient of the map must be (N, 1, H, W) in the accumulator's dtype on the "
                    "features' device, got ",
                    shape_of(g), " ", torch::headeronly::toString(g.scalar_type()));
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
  return torch::stable::contiguous(feat, memory_format(order));
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
    const Tensor w = torch::stable::contiguous(weights[l]);
    layers.views.push_back({a.size(0), a.size(1), a.size(2), a.size(3), order, view_of(a, order),
                            view_of(b, order), w.const_data_ptr()});
    layers.owned.insert(layers.owned.end(), {a, b, w});
  }
  return layers;
}

inline Tensor empty_gradient(const Tensor& feat, MemoryOrder order) {
  return torch::stable::empty(feat.sizes(), feat.scalar_type(), std::nullopt, feat.device(),
                              std::nullopt, memory_format(order));
}

}  // namespace lpips_fast
