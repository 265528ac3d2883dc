#include "winograd_kernels.h"

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <utility>

namespace lpips_fast {
namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();

// Rows of a product at a time: as many accumulators as leave registers for a panel's two vectors
// and a factor. AVX512 has 32 registers, AVX2 16.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif

// The points p and q and their powers, all exact.
constexpr float kP = 0.625f, kQ = 1.5f;
constexpr float kP2 = kP * kP, kQ2 = kQ * kQ;
constexpr float kP3 = kP2 * kP, kQ3 = kQ2 * kQ;

Vec load(const float* from, int64_t count) {
  return count == kLanes ? Vec::loadu(from) : Vec::loadu(from, count);
}

void store(const Vec& value, float* to, int64_t count) {
  count == kLanes ? value.store(to) : value.store(to, static_cast<int>(count));
}

// B^T d: row i holds the coefficients of the product of (x - point) over all points but the i-th;
// those of a pair +-p share their even and their odd part.
inline std::array<Vec, kTileIn> transform_in(const std::array<Vec, kTileIn>& d) {
  using at::vec::fmadd;
  const Vec p(kP), q(kQ), minus_p2(-kP2), minus_q2(-kQ2), p2q2(kP2 * kQ2), minus_sum(-kP2 - kQ2);
  const Vec even_p = fmadd(minus_q2, d[2], d[4]), odd_p = p * fmadd(minus_q2, d[1], d[3]);
  const Vec even_q = fmadd(minus_p2, d[2], d[4]), odd_q = q * fmadd(minus_p2, d[1], d[3]);
  return {fmadd(p2q2, d[0], fmadd(minus_sum, d[2], d[4])),
          even_p + odd_p,
          even_p - odd_p,
          even_q + odd_q,
          even_q - odd_q,
          fmadd(p2q2, d[1], fmadd(minus_sum, d[3], d[5]))};
}

// A^T m: the powers of the points. `count` is the tile's outputs, a side.
template <int64_t count>
inline std::array<Vec, count> transform_out(const std::array<Vec, kTileIn>& m) {
  using at::vec::fmadd;
  const Vec sum_p = m[1] + m[2], difference_p = m[1] - m[2];
  const Vec sum_q = m[3] + m[4], difference_q = m[3] - m[4];
  const Vec first = m[0] + sum_p + sum_q;
  if constexpr (count == 2) {
    return {first, fmadd(Vec(kP), difference_p, fmadd(Vec(kQ), difference_q, m[5]))};
  } else {
    return {first, fmadd(Vec(kP), difference_p, Vec(kQ) * difference_q),
            fmadd(Vec(kP2), sum_p, Vec(kQ2) * sum_q),
            fmadd(Vec(kP3), difference_p, fmadd(Vec(kQ3), difference_q, m[5]))};
  }
}

// `r...` is 0, 1, ..., rows - 1. Indices known from the start, rather than unrolled loops, let the
// compiler keep the accumulators in registers.
template <int... r>
void multiply_rows(std::integer_sequence<int, r...>, const float* rows, const float* panel,
                   float* product, int64_t depth, int64_t product_stride) {
  std::array<Vec, sizeof...(r)> left{((void)r, Vec(0.f))...}, right = left;
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = Vec::loadu(panel + k * 2 * kLanes);
    const Vec b1 = Vec::loadu(panel + k * 2 * kLanes + kLanes);
    const auto accumulate = [&](const Vec& a, Vec& on_left, Vec& on_right) {
      on_left = at::vec::fmadd(a, b0, on_left);
      on_right = at::vec::fmadd(a, b1, on_right);
    };
    (accumulate(Vec(rows[r * depth + k]), left[r], right[r]), ...);
  }
  (left[r].store(product + r * product_stride), ...);
  (right[r].store(product + r * product_stride + kLanes), ...);
}

// The rows left over, fewer than kRows.
template <int... counts>
void multiply_rest(std::integer_sequence<int, counts...>, int64_t count, const float* rows,
                   const float* panel, float* product, int64_t depth, int64_t product_stride) {
  ((count == counts + 1 ? multiply_rows(std::make_integer_sequence<int, counts + 1>(), rows, panel,
                                        product, depth, product_stride)
                        : void()),
   ...);
}

template <int64_t tile_out>
void transform_output(const float* m, int64_t stride, const WinogradImage& shape, int64_t tile,
                      const WinogradEpilogue& epilogue, float* out) {
  const int64_t top = tile / shape.tile_columns() * tile_out;
  const int64_t left = tile % shape.tile_columns() * tile_out;
  const int64_t rows = std::min(tile_out, shape.height - top);
  const int64_t columns = std::min(tile_out, shape.width - left);
  const int64_t channels = shape.out_channels;
  const Vec zero(0.f);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t count = std::min(kLanes, channels - c);
    const Vec bias = epilogue.bias ? load(epilogue.bias + c, count) : zero;
    Vec half[tile_out][kTileIn];
    for (int64_t j = 0; j < kTileIn; ++j) {
      std::array<Vec, kTileIn> column;
      for (int64_t i = 0; i < kTileIn; ++i)
        column[i] = Vec::loadu(m + (i * kTileIn + j) * stride + c);  // panels are whole vectors
      const auto transformed = transform_out<tile_out>(column);
      for (int64_t i = 0; i < tile_out; ++i) half[i][j] = transformed[i];
    }
    for (int64_t i = 0; i < rows; ++i) {
      const auto row = transform_out<tile_out>(
          {half[i][0], half[i][1], half[i][2], half[i][3], half[i][4], half[i][5]});
      const int64_t at = ((top + i) * shape.width + left) * channels + c;
      for (int64_t j = 0; j < columns; ++j) {
        Vec value = row[j] + bias;
        if (epilogue.add) value = value + load(epilogue.add + at + j * channels, count);
        if (epilogue.relu) value = at::vec::maximum(value, zero);
        if (epilogue.mask) {
          const Vec mask = load(epilogue.mask + at + j * channels, count);
          value = Vec::blendv(value, zero, mask <= zero);
        }
        store(value, out + at + j * channels, count);
      }
    }
  }
}

}  // namespace

int64_t winograd_panel_width() { return 2 * kLanes; }

void winograd_transform_weight(const float* weight, int64_t kernel, int64_t stride_h,
                               int64_t stride_w, float* to, int64_t stride) {
  constexpr int64_t kLargest = 5;
  constexpr double p2 = kP2, q2 = kQ2;
  // G: powers of each point over the product of its differences to the others.
  constexpr double points[kTileIn - 1] = {0, kP, -kP, kQ, -kQ};
  constexpr double products[kTileIn - 1] = {p2 * q2, 2 * p2 * (p2 - q2), 2 * p2 * (p2 - q2),
                                            2 * q2 * (q2 - p2), 2 * q2 * (q2 - p2)};
  double g[kTileIn][kLargest] = {};
  for (int64_t i = 0; i < kTileIn - 1; ++i) {
    double power = 1;
    for (int64_t k = 0; k < kernel; ++k, power *= points[i]) g[i][k] = power / products[i];
  }
  g[kTileIn - 1][kernel - 1] = 1;  // infinity
  double half[kTileIn][kLargest] = {};
  for (int64_t i = 0; i < kTileIn; ++i)
    for (int64_t h = 0; h < kernel; ++h)
      for (int64_t w = 0; w < kernel; ++w)
        half[i][w] += g[i][h] * weight[h * stride_h + w * stride_w];
  for (int64_t i = 0; i < kTileIn; ++i) {
    for (int64_t j = 0; j < kTileIn; ++j) {
      double sum = 0;
      for (int64_t w = 0; w < kernel; ++w) sum += half[i][w] * g[j][w];
      to[(i * kTileIn + j) * stride] = static_cast<float>(sum);
    }
  }
}

void winograd_transform_input(const float* image, const WinogradImage& shape, int64_t tile,
                              float* to, int64_t stride) {
  const int64_t top = tile / shape.tile_columns() * shape.tile_out() - shape.kernel / 2;
  const int64_t left = tile % shape.tile_columns() * shape.tile_out() - shape.kernel / 2;
  const int64_t channels = shape.in_channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t count = std::min(kLanes, channels - c);
    Vec columns[kTileIn][kTileIn];  // [row of B^T][column of the tile]
    for (int64_t j = 0; j < kTileIn; ++j) {
      const int64_t x = left + j;
      std::array<Vec, kTileIn> d;
      for (int64_t i = 0; i < kTileIn; ++i) {
        const int64_t y = top + i;
        const bool inside = x >= 0 && x < shape.width && y >= 0 && y < shape.height;
        d[i] = inside ? load(image + (y * shape.width + x) * shape.in_stride + c, count) : Vec(0.f);
      }
      const auto transformed = transform_in(d);
      for (int64_t i = 0; i < kTileIn; ++i) columns[i][j] = transformed[i];
    }
    for (int64_t i = 0; i < kTileIn; ++i) {
      const auto transformed = transform_in({columns[i][0], columns[i][1], columns[i][2],
                                             columns[i][3], columns[i][4], columns[i][5]});
      for (int64_t j = 0; j < kTileIn; ++j)
        store(transformed[j], to + (i * kTileIn + j) * stride + c, count);
    }
  }
}

void winograd_multiply_panel(const float* rows, const float* panel, float* product, int64_t count,
                             int64_t depth, int64_t product_stride) {
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows)
    multiply_rows(std::make_integer_sequence<int, kRows>(), rows + r * depth, panel,
                  product + r * product_stride, depth, product_stride);
  multiply_rest(std::make_integer_sequence<int, kRows - 1>(), count - r, rows + r * depth, panel,
                product + r * product_stride, depth, product_stride);
}

void winograd_transform_output(const float* m, int64_t stride, const WinogradImage& shape,
                               int64_t tile, const WinogradEpilogue& epilogue, float* out) {
  shape.kernel == 3 ? transform_output<4>(m, stride, shape, tile, epilogue, out)
                    : transform_output<2>(m, stride, shape, tile, epilogue, out);
}

}  // namespace lpips_fast
