// Operator schemas. Implementations register themselves by dispatch key: csrc/cpu and csrc/cuda.
// Fake kernels and autograd are registered in lpips_fast/kernels.
#include "stable_abi.h"

STABLE_TORCH_LIBRARY(lpips_fast, m) {
  m.def("distance(Tensor[] feats0, Tensor[] feats1, Tensor[] weights, float eps) -> Tensor");
  m.def(
      "distance_backward(Tensor grad, Tensor[] feats0, Tensor[] feats1, Tensor[] weights, "
      "float eps, bool need_feats0, bool need_feats1, bool need_weights) -> Tensor[]");
  m.def(
      "masked_distance(Tensor[] feats0, Tensor[] feats1, Tensor[] weights, "
      "Tensor[] position_weights, float eps) -> Tensor");
  m.def(
      "distance_map(Tensor[] feats0, Tensor[] feats1, Tensor[] weights, float eps) "
      "-> Tensor[]");
  m.def(
      "distance_map_backward(Tensor[] grads, Tensor[] feats0, Tensor[] feats1, Tensor[] weights, "
      "float eps, bool need_feats0, bool need_feats1, bool need_weights) -> Tensor[]");
  m.def(
      "tap_backward(Tensor grad, Tensor? deeper, Tensor feat0, Tensor feat1, Tensor weight, "
      "float eps, bool need_weight) -> Tensor[]");
  // CPU alone: elsewhere by torch's own operators (lpips_fast/comparison/masks.py)
  m.def("position_weights(Tensor mask, int[] heights, int[] widths, ScalarType dtype) -> Tensor[]");
  m.def("bias_relu_(Tensor(a!) y, Tensor bias) -> ()");  // CUDA alone: oneDNN fuses it on the CPU
  m.def("max_pool2d(Tensor x, int kernel, int stride, bool ceil_mode) -> Tensor");
  m.def(
      "max_pool2d_backward(Tensor grad, Tensor x, Tensor y, int kernel, int stride, "
      "Tensor? keys=None) -> Tensor");
  m.def("receptive_fields(Tensor x, int[] layers) -> Tensor[]");  // CPU alone
  m.def(
      "scale_images(Tensor[] images, Tensor shift, Tensor scale, bool unit_range, ScalarType "
      "dtype) "
      "-> Tensor");
  // CUDA alone: with every image's flag, 0 or, where it holds what is not finite, NaN. The fused
  // convolutions there lose NaN.
  m.def(
      "scale_images_flagged(Tensor[] images, Tensor shift, Tensor scale, bool unit_range, "
      "ScalarType dtype) -> (Tensor, Tensor)");
  m.def("depth_to_space(Tensor blocks, int stride, int padding, int height, int width) -> Tensor");
  m.def("direct_pack(Tensor weight) -> Tensor");
  m.def(
      "direct_conv2d(Tensor x, Tensor packed, Tensor? bias, bool relu, int out_channels, "
      "int kernel, int stride, int padding) -> Tensor");
  m.def(
      "fire(Tensor x, Tensor squeeze, Tensor squeeze_bias, Tensor expand1x1, "
      "Tensor expand1x1_bias, Tensor expand3x3, Tensor expand3x3_bias, bool winograd) "
      "-> (Tensor, Tensor)");
  m.def(
      "fire_backward(Tensor grad, Tensor x, Tensor squeezed, Tensor squeeze, Tensor expand1x1, "
      "Tensor expand3x3, bool through_relu, bool winograd) -> Tensor");
  m.def("winograd_pack(Tensor weight) -> Tensor");
  m.def(
      "winograd_conv2d(Tensor x, Tensor packed, Tensor? bias, bool relu, Tensor? mask, "
      "int out_channels, int kernel, int stride, int padding, Tensor? add=None, "
      "bool precise=False) -> Tensor");
}
