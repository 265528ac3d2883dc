// From images as users have them to what a trunk takes, in one pass: batches one behind the other,
// [0, 1] taken to [-1, 1] where asked, scaled per channel, channels-last, in the trunk's dtype.
//
// Memory: reads each image once, writes the batch once. A row is scaled plane by plane into a
// buffer in the L1 cache, where the compiler vectorises, and interleaved from there.
#include <algorithm>
#include <vector>

#include "../scale_images.h"
#include "dispatch.h"
#include "parallel.h"

namespace lpips_fast {
namespace {

constexpr int64_t kChannels = kImageChannels;
constexpr int64_t kBuffer = 256;            // pixels
constexpr int64_t kRowsOfWork = 16 * 1024;  // pixels per task

template <typename acc_t>
struct Scaling {
  acc_t shift[kChannels], scale[kChannels];
  bool unit_range;
};

// The operations and their order are those of the original's scaling layer: the same bits.
template <typename in_t, typename out_t, typename acc_t>
void scale_row(const in_t* image, int64_t channel_stride, int64_t column_stride, int64_t width,
               const Scaling<acc_t>& scaling, out_t* out) {
  acc_t planes[kChannels][kBuffer];
  for (int64_t first = 0; first < width; first += kBuffer) {
    const int64_t count = std::min(kBuffer, width - first);
    for (int64_t c = 0; c < kChannels; ++c) {
      const in_t* from = image + c * channel_stride + first * column_stride;
      acc_t* plane = planes[c];
      if (column_stride == 1) {
        for (int64_t x = 0; x < count; ++x) plane[x] = static_cast<acc_t>(from[x]);
      } else {
        for (int64_t x = 0; x < count; ++x) plane[x] = static_cast<acc_t>(from[x * column_stride]);
      }
      if (scaling.unit_range)
        for (int64_t x = 0; x < count; ++x) plane[x] = acc_t(2) * plane[x] - acc_t(1);
      const acc_t shift = scaling.shift[c], scale = scaling.scale[c];
      for (int64_t x = 0; x < count; ++x) plane[x] = (plane[x] - shift) / scale;
    }
    out_t* to = out + first * kChannels;
    for (int64_t x = 0; x < count; ++x)
      for (int64_t c = 0; c < kChannels; ++c)
        to[x * kChannels + c] = static_cast<out_t>(planes[c][x]);
  }
}

template <typename in_t, typename out_t>
void scale_batch(const Tensor& images, const double* shift, const double* scale, bool unit_range,
                 out_t* out) {
  using acc_t = std::conditional_t<std::is_same_v<in_t, double>, double, float>;
  Scaling<acc_t> scaling;
  for (int64_t c = 0; c < kChannels; ++c) {
    scaling.shift[c] = static_cast<acc_t>(shift[c]);
    scaling.scale[c] = static_cast<acc_t>(scale[c]);
  }
  scaling.unit_range = unit_range;
  const int64_t height = images.size(2), width = images.size(3);
  const int64_t stride_n = images.stride(0), stride_c = images.stride(1);
  const int64_t stride_h = images.stride(2), stride_w = images.stride(3);
  const auto* from = static_cast<const in_t*>(images.const_data_ptr());
  parallel_for(0, images.size(0) * height,
               std::max<int64_t>(1, kRowsOfWork / std::max<int64_t>(1, width)),
               [&](int64_t first, int64_t last) {
                 for (int64_t row = first; row < last; ++row)
                   scale_row(from + row / height * stride_n + row % height * stride_h, stride_c,
                             stride_w, width, scaling, out + row * width * kChannels);
               });
}

Tensor scale_images(std::vector<Tensor> images, Tensor shift, Tensor scale, bool unit_range,
                    ScalarType dtype) {
  check_scaling(Backend::kCPU, images, shift, scale, dtype);
  const auto as_double = [](const Tensor& t) {
    return dense(t, MemoryFormat::Contiguous, ScalarType::Double);
  };
  const Tensor shifts = as_double(shift), scales = as_double(scale);
  const Tensor out = empty_scaled_batch(images, dtype);
  if (out.numel() == 0) return out;
  dispatch_feature_dtype(dtype, [&](auto result) {
    using out_t = decltype(result);
    auto* to = static_cast<out_t*>(out.mutable_data_ptr());
    for (const Tensor& image : images) {
      dispatch_feature_dtype(image.scalar_type(), [&](auto element) {
        scale_batch<decltype(element)>(image, static_cast<const double*>(shifts.const_data_ptr()),
                                       static_cast<const double*>(scales.const_data_ptr()),
                                       unit_range, to);
      });
      to += image.numel();
    }
  });
  return out;
}

}  // namespace
}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("scale_images", TORCH_BOX(&lpips_fast::scale_images));
}
