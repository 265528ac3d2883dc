// Which positions of a layer look at the same picture: a key for each, of the bits in its receptive
// field. Positions with one key have equal results in exact arithmetic, in every channel and for
// any weights: the ties of flat, padded and periodic images, that rounding cannot be asked about.
// Max-pooling's backward gives a window's gradient to the first of them (csrc/max_pool.h).
//
// The channels of SqueezeNet's fire module are of two groups, with a key each: a 1x1 convolution's,
// which sees less, and a 3x3 one's.
//
// A key is a hash of 64 bits (polynomials with odd factors, and Murmur's finalizer between the
// layers): two pictures have one key once in 2^64. A convolution's key is that of the keys under
// its kernel, in their order, zeros around the image included; a pooling's that of the set of keys
// in the window, since neither order nor number matters to a maximum.
//
// Memory: reads the images once, then 8 bytes a position and layer. A convolution's hash runs along
// rows, then along columns: 2 k multiplications a position, beside k^2 C_in C_out of the layer's.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "../pool_shape.h"
#include "channels_last_tensors.h"
#include "dispatch.h"
#include "parallel.h"

namespace lpips_fast {
namespace {

constexpr int64_t kPositionsPerTask = 8 * 1024;
constexpr uint64_t kAlongRows = 0x9e3779b97f4a7c15, kAlongColumns = 0xd6e8feb86659fd93;
constexpr uint64_t kBetweenChannels = 0xff51afd7ed558ccd;
constexpr uint64_t kOutside = 0x2545f4914f6cdd1d;  // of a layer's border of zeros

uint64_t mixed(uint64_t h) {
  h = (h ^ h >> 33) * 0xff51afd7ed558ccd;
  return (h ^ h >> 33) * 0xc4ceb9fe1a85ec53;
}

// (N, groups, H, W) of one layer; N is that of images times groups.
struct Keys {
  int64_t batch = 0, height = 0, width = 0, groups = 1;
  std::optional<Tensor> tensor = std::nullopt;
  uint64_t* data = nullptr;

  Keys() = default;
  Keys(int64_t batch, int64_t height, int64_t width, int64_t groups = 1)
      : batch(batch),
        height(height),
        width(width),
        groups(groups),
        tensor(empty({batch / groups, groups, height, width}, ScalarType::Long, cpu())),
        data(static_cast<uint64_t*>(tensor->mutable_data_ptr())) {}

  uint64_t* row(int64_t row_of_all) const { return data + row_of_all * width; }
};

// Calls body(row) for all rows of all images.
template <typename Body>
void for_all_rows(const Keys& keys, int64_t cost, const Body& body) {
  const int64_t per_row = std::max<int64_t>(1, keys.width * cost);
  parallel_for(0, keys.batch * keys.height, std::max<int64_t>(1, kPositionsPerTask / per_row),
               [&](int64_t first, int64_t last) {
                 for (int64_t row = first; row < last; ++row) body(row);
               });
}

template <typename scalar_t>
uint64_t key_of_pixel(const scalar_t* channels, int64_t count) {
  uint64_t h = 0;
  for (int64_t c = 0; c < count; ++c) {
    using bits_t =
        std::conditional_t<sizeof(scalar_t) == 2, uint16_t,
                           std::conditional_t<sizeof(scalar_t) == 4, uint32_t, uint64_t>>;
    bits_t bits;
    std::memcpy(&bits, channels + c, sizeof bits);
    constexpr bits_t negative_zero = bits_t(bits_t(1) << (8 * sizeof(bits_t) - 1));
    if (bits == negative_zero) bits = 0;
    h = h * kBetweenChannels + bits;
  }
  return mixed(h);
}

// A row's pixels, `column` numbers apart.
template <typename scalar_t>
void keys_of_pixels(const scalar_t* from, int64_t column, int64_t channels, int64_t width,
                    uint64_t* to) {
  for (int64_t w = 0; w < width; ++w) to[w] = key_of_pixel(from + w * column, channels);
}

template <typename scalar_t>
Keys keys_of_images(const Tensor& x) {
  const int64_t channels = x.size(1), height = x.size(2);
  const Keys keys(x.size(0), height, x.size(3));
  const auto images = positions_of<scalar_t>(x);
  for_all_rows(keys, channels, [&](int64_t row) {
    keys_of_pixels(images.at(row / height, row % height, 0), images.column, channels, keys.width,
                   keys.row(row));
  });
  return keys;
}

struct Convolution {
  int64_t kernel, stride, padding;
  uint64_t outside;  // the key of the zeros around the image

  int64_t size(int64_t of) const { return (of + 2 * padding - kernel) / stride + 1; }

  // Along one row; `clear`: no bounds to be looked at.
  template <bool clear>
  void along_row(const uint64_t* from, int64_t from_width, uint64_t* to, int64_t first,
                 int64_t last) const {
    for (int64_t w = first; w < last; ++w) {
      uint64_t h = 0;
      const int64_t left = w * stride - padding;
      for (int64_t x = left; x < left + kernel; ++x)
        h = h * kAlongRows + (clear || (x >= 0 && x < from_width) ? from[x] : outside);
      to[w] = mixed(h);
    }
  }

  void along_row(const uint64_t* from, int64_t from_width, uint64_t* to, int64_t width) const {
    const int64_t clear_from = std::min(width, (padding + stride - 1) / stride);
    const int64_t clear_to =
        from_width + padding < kernel ? 0 : (from_width + padding - kernel) / stride + 1;
    const int64_t middle = std::clamp(clear_to, clear_from, width);
    along_row<false>(from, from_width, to, 0, clear_from);
    along_row<true>(from, from_width, to, clear_from, middle);
    along_row<false>(from, from_width, to, middle, width);
  }

  // Of what was hashed along rows.
  Keys along_columns(const Keys& rows, int64_t height) const {
    uint64_t row_outside = 0;
    for (int64_t k = 0; k < kernel; ++k) row_outside = row_outside * kAlongRows + outside;
    row_outside = mixed(row_outside);
    const Keys keys(rows.batch, height, rows.width);
    for_all_rows(keys, kernel, [&](int64_t row) {
      const int64_t image = row / height, top = row % height * stride - padding;
      uint64_t* to = keys.row(row);
      std::fill_n(to, keys.width, uint64_t(0));
      for (int64_t y = top; y < top + kernel; ++y) {
        if (y >= 0 && y < rows.height) {
          const uint64_t* from = rows.row(image * rows.height + y);
          for (int64_t w = 0; w < keys.width; ++w) to[w] = to[w] * kAlongColumns + from[w];
        } else {
          for (int64_t w = 0; w < keys.width; ++w) to[w] = to[w] * kAlongColumns + row_outside;
        }
      }
      for (int64_t w = 0; w < keys.width; ++w) to[w] = mixed(to[w]);
    });
    return keys;
  }
};

Keys convolved(const Keys& of, const Convolution& layer) {
  const Keys rows(of.batch, of.height, layer.size(of.width));
  for_all_rows(rows, layer.kernel, [&](int64_t row) {
    layer.along_row(of.row(row), of.width, rows.row(row), rows.width);
  });
  return layer.along_columns(rows, layer.size(of.height));
}

// The same of images, whose own keys, a row at a time, never leave the cache.
template <typename scalar_t>
Keys convolved(const Tensor& x, const Convolution& layer) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const auto images = positions_of<scalar_t>(x);
  const Keys rows(x.size(0), height, layer.size(width));
  for_all_rows(rows, channels * layer.stride + layer.kernel, [&](int64_t row) {
    std::vector<uint64_t> pixels(width);
    keys_of_pixels(images.at(row / height, row % height, 0), images.column, channels, width,
                   pixels.data());
    layer.along_row(pixels.data(), width, rows.row(row), rows.width);
  });
  return layer.along_columns(rows, layer.size(height));
}

// A set's key: of the sum of its members', each counted once.
Keys pooled(const Keys& of, int64_t kernel, int64_t stride, bool ceil_mode) {
  const Keys keys(of.batch, pooled_size(of.height, kernel, stride, ceil_mode),
                  pooled_size(of.width, kernel, stride, ceil_mode), of.groups);
  for_all_rows(keys, kernel * kernel, [&](int64_t row) {
    const int64_t image = row / keys.height, top = row % keys.height * stride;
    std::vector<uint64_t> seen;
    for (int64_t w = 0; w < keys.width; ++w) {
      seen.clear();
      uint64_t h = 0;
      for (int64_t y = top; y < std::min(top + kernel, of.height); ++y) {
        const uint64_t* from = of.row(image * of.height + y);
        for (int64_t x = w * stride; x < std::min(w * stride + kernel, of.width); ++x) {
          if (std::find(seen.begin(), seen.end(), from[x]) != seen.end()) continue;
          seen.push_back(from[x]);
          h += from[x];
        }
      }
      keys.row(row)[w] = mixed(h);
    }
  });
  return keys;
}

// Two batches of keys as the two groups of one.
Keys side_by_side(const Keys& left, const Keys& right) {
  const Keys keys(2 * left.batch, left.height, left.width, 2);
  for_all_rows(left, 1, [&](int64_t row) {
    const int64_t image = row / keys.height, y = row % keys.height;
    std::copy_n(left.row(row), keys.width, keys.row(2 * image * keys.height + y));
    std::copy_n(right.row(row), keys.width, keys.row((2 * image + 1) * keys.height + y));
  });
  return keys;
}

// One key for all groups, for a layer that sees all channels.
Keys together(const Keys& of) {
  if (of.groups == 1) return of;
  const Keys keys(of.batch / of.groups, of.height, of.width);
  for_all_rows(keys, of.groups, [&](int64_t row) {
    const int64_t image = row / keys.height, y = row % keys.height;
    for (int64_t w = 0; w < keys.width; ++w) {
      uint64_t h = 0;
      for (int64_t g = 0; g < of.groups; ++g)
        h = h * kBetweenChannels + of.row((image * of.groups + g) * keys.height + y)[w];
      keys.row(row)[w] = mixed(h);
    }
  });
  return keys;
}

enum Layer : int64_t { kConvolution = 0, kPooling = 1, kFire = 2 };

// One layer's four numbers: its kind, kernel, stride, and padding or (of a pooling) ceil_mode; of a
// fire module these are its 3x3 convolution's.
struct LayerShape {
  int64_t kind, kernel, stride, last;

  LayerShape(const std::vector<int64_t>& layers, size_t k)
      : kind(layers[k]), kernel(layers[k + 1]), stride(layers[k + 2]), last(layers[k + 3]) {
    LPIPS_FAST_CHECK(kind >= kConvolution && kind <= kFire, "receptive_fields knows the kinds ",
                     "of layers 0, 1 and 2, got ", kind);
    check_parameter("kernel", kernel, 1);
    check_parameter("stride", stride, 1);
    check_parameter("padding", last, 0);
  }

  void check_size(int64_t height, int64_t width) const {
    const int64_t border = kind == kPooling ? kernel : 2 * last;  // windows may hang over
    LPIPS_FAST_CHECK(height + border >= kernel && width + border >= kernel,
                     "receptive_fields: images of ", height, "x", width,
                     " are smaller than a layer's kernel of ", kernel, "x", kernel);
  }

  bool moves() const { return kernel > 1 || stride > 1 || last > 0; }
  Convolution convolution(uint64_t outside) const { return {kernel, stride, last, outside}; }
};

// The keys (N, groups, H, W) that stand before every pooling. `layers` has four numbers for each,
// and ends with a pooling.
std::vector<Tensor> receptive_fields(Tensor x, std::vector<int64_t> layers) {
  Operands(Backend::kCPU).check("x", x);
  check_images("receptive_fields", x);
  LPIPS_FAST_CHECK(layers.size() % 4 == 0, "receptive_fields takes four numbers a layer, got ",
                   layers.size(), " in all");
  std::vector<Tensor> before_poolings;
  if (layers.empty()) return before_poolings;
  x = with_dense_channels(x);
  Keys keys;
  uint64_t outside = 0;
  size_t k = 0;
  const LayerShape first(layers, k);
  first.check_size(x.size(2), x.size(3));
  dispatch_feature_dtype(x.scalar_type(), [&](auto feature) {
    using feature_t = decltype(feature);
    const std::vector<feature_t> zeros(x.size(1), feature_t(0));
    outside = key_of_pixel(zeros.data(), x.size(1));
    if (first.kind == kConvolution && first.moves()) {
      keys = convolved<feature_t>(x, first.convolution(outside));
      outside = kOutside;
      k = 4;
    } else {
      keys = keys_of_images<feature_t>(x);
    }
  });
  for (; k < layers.size(); k += 4) {
    const LayerShape layer(layers, k);
    layer.check_size(keys.height, keys.width);
    if (layer.kind == kPooling) {
      before_poolings.push_back(*keys.tensor);
      if (k + 4 < layers.size()) keys = pooled(keys, layer.kernel, layer.stride, layer.last != 0);
    } else {
      keys = together(keys);
      if (layer.kind == kFire) {
        keys = side_by_side(keys, convolved(keys, layer.convolution(outside)));
      } else if (layer.moves()) {
        keys = convolved(keys, layer.convolution(outside));
      }
    }
    outside = kOutside;
  }
  return before_poolings;
}

}  // namespace
}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("receptive_fields", TORCH_BOX(&lpips_fast::receptive_fields));
}
