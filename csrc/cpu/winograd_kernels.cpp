#include "winograd_kernels.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "float_vectors.h"

namespace lpips_fast {
namespace {

// Rows of a product at a time: as many accumulators as leave registers for a panel's two vectors
// and a factor. AVX512 has 32 registers, AVX2 16.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif

// The points beside 0 and infinity are +-p for each p of a tile of n inputs, (n - 2) / 2 of them.
// Their powers are exact.
template <int64_t tile_in>
constexpr std::array<float, (tile_in - 2) / 2> kPoints;
template <>
constexpr std::array<float, 2> kPoints<6>{0.625f, 1.5f};
template <>
constexpr std::array<float, 3> kPoints<8>{0.5f, 1.f, 2.f};

// Numbers c to c + count of a block's row, which is at row y of image n and begins at column x.
template <typename scalar_t>
inline Vec load_block(const Positions<const scalar_t>& images, int64_t n,
                      const WinogradImage& shape, int64_t y, int64_t x, int64_t c, int64_t count) {
  if (y < 0 || y >= shape.in_height) return Vec(0.f);
  if (x >= 0 && x + shape.stride <= shape.in_width) return load(images.at(n, y, x) + c, count);
  if (x + shape.stride <= 0 || x >= shape.in_width) return Vec(0.f);
  float part[kLanes] = {};  // across a border, where stride > 1
  for (int64_t k = 0; k < count; ++k) {
    const int64_t column = x + (c + k) / shape.in_channels;
    if (column >= 0 && column < shape.in_width)
      part[k] = static_cast<float>(images.at(n, y, column)[(c + k) % shape.in_channels]);
  }
  return Vec::loadu(part);
}

// (x^2 - p^2) (x^2 - q^2) ... over the points but the one left out: coefficients of 1, x^2, x^4 ...
template <size_t count>
constexpr std::array<float, count + 1> even_polynomial(const std::array<float, count>& points,
                                                       size_t left_out) {
  std::array<float, count + 1> polynomial{1.f};
  for (size_t k = 0, degree = 0; k < count; ++k) {
    if (k == left_out) continue;
    ++degree;
    for (size_t i = degree; i > 0; --i)
      polynomial[i] = polynomial[i - 1] - points[k] * points[k] * polynomial[i];
    polynomial[0] *= -points[k] * points[k];
  }
  return polynomial;
}

// The sum of polynomial[i] * d[first + 2 i], i < terms; the last coefficient is 1.
template <size_t terms, size_t size, size_t inputs>
inline Vec every_second(const std::array<float, size>& polynomial, const std::array<Vec, inputs>& d,
                        size_t first) {
  Vec sum = d[first + 2 * (terms - 1)];
  for (size_t i = terms - 1; i-- > 0;)
    sum = at::vec::fmadd(Vec(polynomial[i]), d[first + 2 * i], sum);
  return sum;
}

// B^T d: row i holds the coefficients of the product of (x - point) over all points but the i-th;
// those of a pair +-p share their even and their odd part.
template <int64_t tile_in>
inline std::array<Vec, tile_in> transform_in(const std::array<Vec, tile_in>& d) {
  constexpr auto& points = kPoints<tile_in>;
  constexpr size_t pairs = points.size();
  constexpr auto all = even_polynomial(points, pairs);
  std::array<Vec, tile_in> transformed;
  transformed[0] = every_second<pairs + 1>(all, d, 0);
  for (size_t k = 0; k < pairs; ++k) {
    const auto others = even_polynomial(points, k);
    const Vec even = every_second<pairs>(others, d, 2);
    const Vec odd = Vec(points[k]) * every_second<pairs>(others, d, 1);
    transformed[2 * k + 1] = even + odd;
    transformed[2 * k + 2] = even - odd;
  }
  transformed[tile_in - 1] = every_second<pairs + 1>(all, d, 1);
  return transformed;
}

// A^T m: the powers of the points.
template <int64_t tile_in>
inline std::array<Vec, kTileOut> transform_out(const std::array<Vec, tile_in>& m) {
  constexpr auto& points = kPoints<tile_in>;
  std::array<Vec, kTileOut> y{m[0], Vec(0.f), Vec(0.f), m[tile_in - 1]};
  for (size_t k = 0; k < points.size(); ++k) {
    const Vec sum = m[2 * k + 1] + m[2 * k + 2], difference = m[2 * k + 1] - m[2 * k + 2];
    const float p = points[k];
    y[0] = y[0] + sum;
    y[1] = at::vec::fmadd(Vec(p), difference, y[1]);
    y[2] = at::vec::fmadd(Vec(p * p), sum, y[2]);
    y[3] = at::vec::fmadd(Vec(p * p * p), difference, y[3]);
  }
  return y;
}

// `r...` is 0, 1, ..., rows - 1. Indices known from the start, rather than unrolled loops, let the
// compiler keep the accumulators in registers.
template <bool adds, int... r>
void multiply_rows(std::integer_sequence<int, r...>, const float* rows, const float* panel,
                   float* product, int64_t depth, int64_t row_stride, int64_t product_stride) {
  std::array<Vec, sizeof...(r)> left{((void)r, Vec(0.f))...}, right = left;
  // A run is short: as a loop of single steps, its end, mispredicted, counts.
#pragma GCC unroll 8
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = Vec::loadu(panel + k * 2 * kLanes);
    const Vec b1 = Vec::loadu(panel + k * 2 * kLanes + kLanes);
    const auto accumulate = [&](const Vec& a, Vec& on_left, Vec& on_right) {
      on_left = at::vec::fmadd(a, b0, on_left);
      on_right = at::vec::fmadd(a, b1, on_right);
    };
    (accumulate(Vec(rows[r * row_stride + k]), left[r], right[r]), ...);
  }
  const auto finish = [&](const Vec& sum, float* to) {
    (adds ? Vec::loadu(to) + sum : sum).store(to);
  };
  (finish(left[r], product + r * product_stride), ...);
  (finish(right[r], product + r * product_stride + kLanes), ...);
}

// A group of rows, a run of the sum, of at most `length` channels, after the other.
template <int count>
void multiply_group(const float* rows, const float* panel, float* product, int64_t depth,
                    int64_t length, int64_t product_stride) {
  constexpr auto indices = std::make_integer_sequence<int, count>();
  const int64_t runs = (depth + length - 1) / length;
  multiply_rows<false>(indices, rows, panel, product, depth / runs, depth, product_stride);
  for (int64_t run = 1; run < runs; ++run) {
    const int64_t first = run * depth / runs, last = (run + 1) * depth / runs;
    multiply_rows<true>(indices, rows + first, panel + first * 2 * kLanes, product, last - first,
                        depth, product_stride);
  }
}

// The rows left over, fewer than kRows.
template <int... counts>
void multiply_rest(std::integer_sequence<int, counts...>, int64_t count, const float* rows,
                   const float* panel, float* product, int64_t depth, int64_t length,
                   int64_t product_stride) {
  ((count == counts + 1
        ? multiply_group<counts + 1>(rows, panel, product, depth, length, product_stride)
        : void()),
   ...);
}

template <int64_t tile_in, bool has_outliers, typename scalar_t>
void transform_input(const Positions<const scalar_t>& images, int64_t n, const WinogradImage& shape,
                     int64_t tile, float* to, int64_t stride) {
  const int64_t top = tile / shape.tile_columns() * kTileOut;
  const int64_t left = tile % shape.tile_columns() * kTileOut;
  const int64_t row_of_block = shape.row_of_block();
  for (int64_t r = 0; r < shape.stride; ++r) {
    for (int64_t c = 0; c < row_of_block; c += kLanes) {
      const int64_t count = std::min(kLanes, row_of_block - c);
      std::array<Vec, tile_in> half[tile_in];  // [row of B^T][column of the tile]
      for (int64_t j = 0; j < tile_in; ++j) {
        const int64_t x = (left + j) * shape.stride - shape.padding;
        std::array<Vec, tile_in> column;
        for (int64_t i = 0; i < tile_in; ++i) {
          const int64_t y = (top + i) * shape.stride - shape.padding + r;
          column[i] = load_block(images, n, shape, y, x, c, count);
          if constexpr (has_outliers)  // NaN is not within
            column[i] = Vec::blendv(Vec(0.f), column[i], column[i].abs() <= Vec(kOutlierBound));
        }
        const auto transformed = transform_in<tile_in>(column);
        for (int64_t i = 0; i < tile_in; ++i) half[i][j] = transformed[i];
      }
      float* channels = to + r * row_of_block + c;
      for (int64_t i = 0; i < tile_in; ++i) {
        const auto transformed = transform_in<tile_in>(half[i]);
        for (int64_t j = 0; j < tile_in; ++j)
          store(transformed[j], channels + (i * tile_in + j) * stride, count);
      }
    }
  }
}

template <int64_t tile_in, typename scalar_t>
void transform_output(const float* m, int64_t stride, const float* outliers, int64_t all_columns,
                      const WinogradImage& shape, int64_t tile,
                      const ConvolutionEpilogue<scalar_t>& epilogue,
                      const Positions<scalar_t>& results, int64_t n) {
  const int64_t top = tile / shape.tile_columns() * kTileOut;
  const int64_t left = tile % shape.tile_columns() * kTileOut;
  const int64_t rows = std::min(kTileOut, shape.height - top);
  const int64_t columns = std::min(kTileOut, shape.width - left);
  for (int64_t c = 0; c < shape.out_channels; c += kLanes) {
    const int64_t count = std::min(kLanes, shape.out_channels - c);
    std::array<Vec, tile_in> half[kTileOut];
    for (int64_t j = 0; j < tile_in; ++j) {
      std::array<Vec, tile_in> column;
      for (int64_t i = 0; i < tile_in; ++i)
        column[i] = Vec::loadu(m + (i * tile_in + j) * stride + c);  // panels are whole vectors
      const auto transformed = transform_out<tile_in>(column);
      for (int64_t i = 0; i < kTileOut; ++i) half[i][j] = transformed[i];
    }
    for (int64_t i = 0; i < rows; ++i) {
      auto row = transform_out<tile_in>(half[i]);
      if (outliers != nullptr)
        for (int64_t j = 0; j < kTileOut; ++j)
          row[j] = row[j] + Vec::loadu(outliers + (i * kTileOut + j) * all_columns + c);
      const RowEpilogue<scalar_t> of_row(epilogue, results, n, top + i, left, c, count);
      for (int64_t j = 0; j < columns; ++j) of_row.finish(row[j], j);
    }
  }
}

// G: powers of each point over the product of its differences to the others.
template <int64_t tile_in>
void transform_weight(const float* weight, int64_t stride_h, int64_t stride_w, float* to,
                      int64_t stride) {
  constexpr int64_t kernel = tile_in + 1 - kTileOut;
  double points[tile_in - 1] = {};
  for (size_t k = 0; k < kPoints<tile_in>.size(); ++k) {
    points[2 * k + 1] = kPoints<tile_in>[k];
    points[2 * k + 2] = -points[2 * k + 1];
  }
  double g[tile_in][kernel] = {};
  for (int64_t i = 0; i < tile_in - 1; ++i) {
    double product = 1, power = 1;
    for (int64_t k = 0; k < tile_in - 1; ++k)
      if (k != i) product *= points[i] - points[k];
    for (int64_t k = 0; k < kernel; ++k, power *= points[i]) g[i][k] = power / product;
  }
  g[tile_in - 1][kernel - 1] = 1;  // infinity
  double half[tile_in][kernel] = {};
  for (int64_t i = 0; i < tile_in; ++i)
    for (int64_t h = 0; h < kernel; ++h)
      for (int64_t w = 0; w < kernel; ++w)
        half[i][w] += g[i][h] * weight[h * stride_h + w * stride_w];
  for (int64_t i = 0; i < tile_in; ++i) {
    for (int64_t j = 0; j < tile_in; ++j) {
      double sum = 0;
      for (int64_t w = 0; w < kernel; ++w) sum += half[i][w] * g[j][w];
      to[(i * tile_in + j) * stride] = static_cast<float>(sum);
    }
  }
}

}  // namespace

int64_t winograd_panel_width() { return 2 * kLanes; }

void winograd_transform_weight(const float* weight, int64_t kernel, int64_t stride_h,
                               int64_t stride_w, float* to, int64_t stride) {
  kernel == 3 ? transform_weight<6>(weight, stride_h, stride_w, to, stride)
              : transform_weight<8>(weight, stride_h, stride_w, to, stride);
}

template <typename scalar_t>
void winograd_transform_input(const Positions<const scalar_t>& images, int64_t n,
                              const WinogradImage& shape, int64_t tile, bool has_outliers,
                              float* to, int64_t stride) {
  const auto transform = [&](auto size) {
    has_outliers ? transform_input<size, true>(images, n, shape, tile, to, stride)
                 : transform_input<size, false>(images, n, shape, tile, to, stride);
  };
  shape.kernel == 3 ? transform(std::integral_constant<int64_t, 6>())
                    : transform(std::integral_constant<int64_t, 8>());
}

// By the bits without their sign, which are in the numbers' order, NaN last.
template <typename scalar_t>
bool winograd_has_outliers(const scalar_t* numbers, int64_t count) {
  using bits_t = std::conditional_t<sizeof(scalar_t) == 4, int32_t, int16_t>;
  const auto bits_of = [](scalar_t number) {
    if constexpr (std::is_same_v<scalar_t, float>) {
      return std::bit_cast<bits_t>(number);
    } else {
      return std::bit_cast<bits_t>(number.x);
    }
  };
  bits_t largest = 0;
  for (int64_t k = 0; k < count; ++k)
    largest = std::max<bits_t>(largest, bits_of(numbers[k]) & std::numeric_limits<bits_t>::max());
  return largest > bits_of(static_cast<scalar_t>(kOutlierBound));
}

template <typename scalar_t>
void winograd_add_outliers(const Positions<const scalar_t>& images, int64_t n,
                           const WinogradImage& shape, int64_t tile, const float* weights,
                           int64_t columns, float* sums) {
  const int64_t tile_in = winograd_tile_in(shape.kernel), width = winograd_panel_width();
  const int64_t top = tile / shape.tile_columns() * kTileOut;
  const int64_t left = tile % shape.tile_columns() * kTileOut;
  const auto add = [&](int64_t i, int64_t j, int64_t depth, float value) {
    const int64_t in_block = depth / shape.in_channels;
    const int64_t r = in_block / shape.stride, q = in_block % shape.stride;
    // At place (i, j) of the tile: results up to kernel - 1 rows and columns before it.
    for (int64_t h = std::max<int64_t>(0, i - shape.kernel + 1); h <= std::min(i, kTileOut - 1);
         ++h) {
      for (int64_t w = std::max<int64_t>(0, j - shape.kernel + 1); w <= std::min(j, kTileOut - 1);
           ++w) {
        if ((i - h) * shape.stride + r >= shape.extent ||
            (j - w) * shape.stride + q >= shape.extent)
          continue;  // a weight that is none: 0, which times infinity is NaN
        const int64_t tap = (i - h) * shape.kernel + j - w;
        float* to = sums + (h * kTileOut + w) * columns;
        const float* from = weights + (tap * columns * shape.depth()) + depth * width;
        for (int64_t c = 0; c < columns; c += width, from += shape.depth() * width)
          for (int64_t k = 0; k < width; ++k) to[c + k] += value * from[k];
      }
    }
  };
  for (int64_t i = 0; i < tile_in; ++i) {
    for (int64_t j = 0; j < tile_in; ++j) {
      for (int64_t r = 0; r < shape.stride * shape.stride; ++r) {
        const int64_t y = (top + i) * shape.stride - shape.padding + r / shape.stride;
        const int64_t x = (left + j) * shape.stride - shape.padding + r % shape.stride;
        if (y < 0 || y >= shape.in_height || x < 0 || x >= shape.in_width) continue;
        const scalar_t* channels = images.at(n, y, x);
        for (int64_t c = 0; c < shape.in_channels; ++c) {
          const float value = static_cast<float>(channels[c]);
          if (!(std::abs(value) <= kOutlierBound)) add(i, j, r * shape.in_channels + c, value);
        }
      }
    }
  }
}

void winograd_multiply_panel(const float* rows, const float* panel, float* product, int64_t count,
                             int64_t depth, int64_t run, int64_t product_stride) {
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows)
    multiply_group<kRows>(rows + r * depth, panel, product + r * product_stride, depth, run,
                          product_stride);
  multiply_rest(std::make_integer_sequence<int, kRows - 1>(), count - r, rows + r * depth, panel,
                product + r * product_stride, depth, run, product_stride);
}

template <typename scalar_t>
void winograd_transform_output(const float* m, int64_t stride, const float* outliers,
                               int64_t columns, const WinogradImage& shape, int64_t tile,
                               const ConvolutionEpilogue<scalar_t>& epilogue,
                               const Positions<scalar_t>& results, int64_t n) {
  shape.kernel == 3
      ? transform_output<6>(m, stride, outliers, columns, shape, tile, epilogue, results, n)
      : transform_output<8>(m, stride, outliers, columns, shape, tile, epilogue, results, n);
}

#define LPIPS_FAST_WINOGRAD_FOR(scalar_t)                                                       \
  template void winograd_transform_input(const Positions<const scalar_t>&, int64_t,             \
                                         const WinogradImage&, int64_t, bool, float*, int64_t); \
  template bool winograd_has_outliers(const scalar_t*, int64_t);                                \
  template void winograd_add_outliers(const Positions<const scalar_t>&, int64_t,                \
                                      const WinogradImage&, int64_t, const float*, int64_t,     \
                                      float*);                                                  \
  template void winograd_transform_output(                                                      \
      const float*, int64_t, const float*, int64_t, const WinogradImage&, int64_t,              \
      const ConvolutionEpilogue<scalar_t>&, const Positions<scalar_t>&, int64_t)
LPIPS_FAST_WINOGRAD_FOR(float);
LPIPS_FAST_WINOGRAD_FOR(c10::BFloat16);
LPIPS_FAST_WINOGRAD_FOR(c10::Half);
#undef LPIPS_FAST_WINOGRAD_FOR

}  // namespace lpips_fast
