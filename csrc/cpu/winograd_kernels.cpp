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

// A^T m: the powers of the points.
inline std::array<Vec, kTileOut> transform_out(const std::array<Vec, kTileIn>& m) {
  using at::vec::fmadd;
  const Vec sum_p = m[1] + m[2], difference_p = m[1] - m[2];
  const Vec sum_q = m[3] + m[4], difference_q = m[3] - m[4];
  return {m[0] + sum_p + sum_q, fmadd(Vec(kP), difference_p, Vec(kQ) * difference_q),
          fmadd(Vec(kP2), sum_p, Vec(kQ2) * sum_q),
          fmadd(Vec(kP3), difference_p, fmadd(Vec(kQ3), difference_q, m[5]))};
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

}  // namespace

int64_t winograd_panel_width() { return 2 * kLanes; }

void winograd_transform_weight(const float* weight, int64_t stride_h, int64_t stride_w, float* to,
                               int64_t stride) {
  constexpr double p = kP, q = kQ;
  // G: powers of the points over the product of their differences.
  constexpr double n0 = p * p * q * q, np = 2 * p * p * (p * p - q * q),
                   nq = 2 * q * q * (q * q - p * p);
  constexpr double g[kTileIn][3] = {{1 / n0, 0, 0},
                                    {1 / np, p / np, p * p / np},
                                    {1 / np, -p / np, p * p / np},
                                    {1 / nq, q / nq, q * q / nq},
                                    {1 / nq, -q / nq, q * q / nq},
                                    {0, 0, 1}};
  double half[kTileIn][3] = {};
  for (int i = 0; i < kTileIn; ++i)
    for (int h = 0; h < 3; ++h)
      for (int w = 0; w < 3; ++w) half[i][w] += g[i][h] * weight[h * stride_h + w * stride_w];
  for (int i = 0; i < kTileIn; ++i) {
    for (int j = 0; j < kTileIn; ++j) {
      double sum = 0;
      for (int w = 0; w < 3; ++w) sum += half[i][w] * g[j][w];
      to[(i * kTileIn + j) * stride] = static_cast<float>(sum);
    }
  }
}

void winograd_transform_input(const float* image, const WinogradImage& shape, int64_t tile,
                              float* to, int64_t stride) {
  const int64_t top = tile / shape.tile_columns() * kTileOut - 1;
  const int64_t left = tile % shape.tile_columns() * kTileOut - 1;
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
        d[i] = inside ? load(image + (y * shape.width + x) * channels + c, count) : Vec(0.f);
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
  const int64_t top = tile / shape.tile_columns() * kTileOut;
  const int64_t left = tile % shape.tile_columns() * kTileOut;
  const int64_t rows = std::min(kTileOut, shape.height - top);
  const int64_t columns = std::min(kTileOut, shape.width - left);
  const int64_t channels = shape.out_channels;
  const Vec zero(0.f);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t count = std::min(kLanes, channels - c);
    const Vec bias = epilogue.bias ? load(epilogue.bias + c, count) : zero;
    Vec half[kTileOut][kTileIn];
    for (int64_t j = 0; j < kTileIn; ++j) {
      std::array<Vec, kTileIn> column;
      for (int64_t i = 0; i < kTileIn; ++i)
        column[i] = Vec::loadu(m + (i * kTileIn + j) * stride + c);  // panels are whole vectors
      const auto transformed = transform_out(column);
      for (int64_t i = 0; i < kTileOut; ++i) half[i][j] = transformed[i];
    }
    for (int64_t i = 0; i < rows; ++i) {
      const auto row =
          transform_out({half[i][0], half[i][1], half[i][2], half[i][3], half[i][4], half[i][5]});
      const int64_t at = ((top + i) * shape.width + left) * channels + c;
      for (int64_t j = 0; j < columns; ++j) {
        Vec value = row[j] + bias;
        if (epilogue.add) value = value + load(epilogue.add + at + j * channels, count);
        if (epilogue.relu) value = at::vec::maximum(value, zero);
        if (epilogue.mask) {
          const Vec mask = load(epilogue.mask + at + j * channels, count);
          value = Vec::blendv(zero, value, mask > zero);
        }
        store(value, out + at + j * channels, count);
      }
    }
  }
}

}  // namespace lpips_fast
