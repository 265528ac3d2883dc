// The torch-free kernels of csrc/cpu on memory that is exactly as large as they may touch, with
// random shapes, against plain loops. scripts/sanitize.py builds it once for every instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/cpu/direct_kernels.h"
#include "../../csrc/cpu/distance_kernels.h"
#include "../../csrc/cpu/max_pool_kernels.h"
#include "../../csrc/cpu/winograd_kernels.h"
#include "../../csrc/sizes.h"
#include "exact_memory.h"

using namespace lpips_fast;
using sanitize::Exact;
using sanitize::expect_close;
using sanitize::integer;

namespace {

template <typename T>
double tolerance() {
  if (sizeof(T) == 8) return 1e-10;
  return sizeof(T) == 4 ? 1e-4 : 3e-2;
}

// ------------------------------------------------------------------------------------ distance

template <typename T>
void distance() {
  using A = accumulator_t<T>;
  const int64_t channels = integer(1, 90), positions = integer(1, 70);
  const bool last = integer(0, 1) != 0;
  const MemoryOrder order = last ? MemoryOrder::kChannelsLast : MemoryOrder::kChannelsFirst;
  const int64_t gap = integer(0, 3);
  const int64_t channel_stride = last ? 1 : positions + gap;
  const int64_t position_stride = last ? channels + gap : 1;
  const int64_t extent = (channels - 1) * channel_stride + (positions - 1) * position_stride + 1;
  Exact<T> a(extent), b(extent), deeper(extent), grad_a(extent), grad_b(extent);
  Exact<A> weight(channels), out(positions), grad(positions), grad_weight(channels);
  std::fill_n(grad_weight.data(), channels, A(0));
  const auto at = [&](auto& memory) {
    return Run<decltype(memory.data())>{memory.data(), channel_stride, position_stride};
  };
  const Exact<T>&ca = a, &cb = b, &cd = deeper;
  const double eps = 1e-10;
  distance_run(ForwardRun<T>{at(ca), at(cb), weight.data(), out.data()}, order, channels, positions,
               eps);
  for (int64_t p = 0; p < positions; ++p) {
    double na = 0, nb = 0, sum = 0;
    const auto value = [&](const Exact<T>& x, int64_t c) {
      return static_cast<double>(x[c * channel_stride + p * position_stride]);
    };
    for (int64_t c = 0; c < channels; ++c) {
      na += value(a, c) * value(a, c);
      nb += value(b, c) * value(b, c);
    }
    na = std::sqrt(na) + eps;
    nb = std::sqrt(nb) + eps;
    for (int64_t c = 0; c < channels; ++c) {
      const double difference = value(a, c) / na - value(b, c) / nb;
      sum += static_cast<double>(weight[c]) * difference * difference;
    }
    expect_close(static_cast<double>(out[p]), sum, sizeof(A) == 8 ? 1e-10 : 1e-4, "distance");
  }
  BackwardRun<T> run{at(ca),     at(cb),     weight.data(),     grad.data(),
                     at(grad_a), at(grad_b), grad_weight.data()};
  if (integer(0, 1)) run.grad_a.data = nullptr;
  if (integer(0, 1)) run.grad_b.data = nullptr;
  if (integer(0, 1)) run.grad_weight = nullptr;
  if (last && integer(0, 1)) {
    run.deeper = at(cd);
    run.through_relu = true;
  }
  distance_backward_run(run, order, channels, positions, eps);
}

// ------------------------------------------------------------------------------------- pooling

template <typename T>
void max_pool() {
  PoolShape s{};
  s.channels = integer(1, 70);
  s.kernel = integer(1, 4);
  s.stride = integer(1, 4);
  s.height = integer(s.kernel, 11);
  s.width = integer(s.kernel, 11);
  const bool ceil_mode = integer(0, 1) != 0;
  s.out_height = pooled_size(s.height, s.kernel, s.stride, ceil_mode);
  s.out_width = pooled_size(s.width, s.kernel, s.stride, ceil_mode);
  const int64_t pooled = s.out_height * s.out_width * s.channels;
  Exact<T> x(s.height * s.width * s.channels), grad_x(x.size()), y(pooled), grad(pooled);
  for (int64_t row = 0; row < s.out_height; ++row) max_pool_row(x.data(), y.data(), s, row);
  for (int64_t i = 0; i < pooled; ++i) {
    const int64_t c = i % s.channels, column = i / s.channels % s.out_width;
    const int64_t row = i / s.channels / s.out_width;
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t h = row * s.stride; h < std::min(row * s.stride + s.kernel, s.height); ++h)
      for (int64_t w = column * s.stride; w < std::min(column * s.stride + s.kernel, s.width); ++w)
        largest = std::max(largest, static_cast<double>(x[(h * s.width + w) * s.channels + c]));
    expect_close(static_cast<double>(y[i]), largest, 0, "max_pool");
  }
  const int64_t groups = s.channels % 2 == 0 ? integer(1, 2) : 1;
  Exact<int64_t> keys(groups * s.height * s.width);
  for (int64_t p = 0; p < keys.size(); ++p) keys[p] = integer(0, 3);
  const int64_t* asked = integer(0, 1) ? keys.data() : nullptr;
  const int64_t middle = integer(1, s.height);
  for (const auto& [top, bottom] : {std::pair(int64_t{0}, middle), std::pair(middle, s.height)}) {
    if (top == bottom) continue;
    max_pool_backward(grad.data(), x.data(), y.data(), asked, groups, grad_x.data(), s, top,
                      bottom);
  }
  double given = 0, taken = 0;
  for (int64_t i = 0; i < pooled; ++i) given += static_cast<double>(grad[i]);
  for (int64_t i = 0; i < x.size(); ++i) taken += static_cast<double>(grad_x[i]);
  expect_close(taken, given, tolerance<T>() * 10, "the sum of max-pooling's gradient");
}

// -------------------------------------------------------------------------------- convolutions

// An image (height, width, channels) among `gap` other channels, and nothing behind its last one.
template <typename T>
struct Image {
  int64_t height, width, channels, column;
  Exact<T> memory;

  Image(int64_t h, int64_t w, int64_t c, int64_t gap)
      : height(h), width(w), channels(c), column(c + gap), memory((h * w - 1) * (c + gap) + c) {}
  Positions<T> positions() { return {memory.data(), 0, width * column, column}; }
  Positions<const T> read() const { return {memory.data(), 0, width * column, column}; }
  double at(int64_t y, int64_t x, int64_t c) const {
    if (y < 0 || y >= height || x < 0 || x >= width) return 0;
    return static_cast<double>(memory[(y * width + x) * column + c]);
  }
};

// What a convolution's epilogue is asked to do, and does in plain numbers.
template <typename T>
struct Epilogue {
  Image<T> add, mask;
  Exact<float> bias;
  bool has_bias = integer(0, 1), has_add = integer(0, 1), has_mask = integer(0, 1),
       relu = integer(0, 1);

  Epilogue(int64_t height, int64_t width, int64_t channels)
      : add(height, width, channels, integer(0, 2)),
        mask(height, width, channels, integer(0, 2)),
        bias(channels) {}

  ConvolutionEpilogue<T> asked() const {
    ConvolutionEpilogue<T> e;
    if (has_bias) e.bias = bias.data();
    if (has_add) e.add = add.read();
    e.relu = relu;
    if (has_mask) e.mask = mask.read();
    return e;
  }

  double of(double sum, int64_t y, int64_t x, int64_t c) const {
    if (has_bias) sum += bias[c];
    if (has_add) sum += add.at(y, x, c);
    if (relu) sum = std::max(sum, 0.0);
    return has_mask && mask.at(y, x, c) <= 0 ? 0 : sum;
  }
};

// sum over (i, j, k) of image(y stride + i - padding, ...) weight(o, k, i, j), for every result.
template <typename T>
void compare(const Image<T>& results, const Image<T>& image, const Exact<float>& weight,
             int64_t kernel, int64_t stride, int64_t padding, const Epilogue<T>& epilogue,
             double tolerated, const char* what) {
  const int64_t channels = image.channels;
  for (int64_t y = 0; y < results.height; ++y) {
    for (int64_t x = 0; x < results.width; ++x) {
      for (int64_t o = 0; o < results.channels; ++o) {
        double sum = 0;
        for (int64_t k = 0; k < channels; ++k)
          for (int64_t i = 0; i < kernel; ++i)
            for (int64_t j = 0; j < kernel; ++j)
              sum += image.at(y * stride + i - padding, x * stride + j - padding, k) *
                     weight[((o * channels + k) * kernel + i) * kernel + j];
        expect_close(results.at(y, x, o), epilogue.of(sum, y, x, o), tolerated, what);
      }
    }
  }
}

void direct() {
  const int64_t kernel = integer(1, 4), stride = integer(1, 3);
  const int64_t channels = integer(1, 20), out_channels = integer(1, 70);
  const int64_t height = integer(1, 4), width = integer(1, 30), padding = integer(0, kernel - 1);
  const auto size_of = [&](int64_t results) {
    return std::max<int64_t>(1, (results - 1) * stride + kernel - 2 * padding);
  };
  Image<float> image(size_of(height), size_of(width), channels, integer(0, 1) * integer(1, 3));
  Image<float> results(height, width, out_channels, integer(0, 2));
  Exact<float> weight(out_channels * channels * kernel * kernel);
  Exact<float> packed(kernel * kernel * channels * direct_packed_channels(out_channels));
  direct_pack(weight.data(), {channels * kernel * kernel, kernel * kernel, kernel, 1}, kernel,
              channels, out_channels, packed.data());
  const Epilogue<float> epilogue(height, width, out_channels);
  const DirectConvolution convolution{.width = width,
                                      .kernel = kernel,
                                      .stride = stride,
                                      .in_channels = channels,
                                      .out_channels = out_channels,
                                      .images = image.read(),
                                      .packed = packed.data(),
                                      .epilogue = epilogue.asked(),
                                      .results = results.positions(),
                                      .padding = padding,
                                      .in_height = image.height,
                                      .in_width = image.width};
  const int64_t middle = integer(0, height);
  direct_convolve_rows(convolution, 0, 0, middle);
  direct_convolve_rows(convolution, 0, middle, height);
  compare(results, image, weight, kernel, stride, padding, epilogue, 1e-3, "direct convolution");
}

template <typename T>
void winograd() {
  const int64_t stride = integer(1, 3), blocks = integer(0, 1) ? 3 : 5;
  const int64_t kernel = integer((blocks - 1) * stride + 1, blocks * stride);
  const int64_t padding = integer(0, kernel - 1);
  const int64_t channels = integer(1, 12), out_channels = integer(1, 40);
  const int64_t least = std::max<int64_t>(1, kernel - 2 * padding);
  Image<T> image(integer(least, least + 12), integer(least, least + 12), channels,
                 stride == 1 ? integer(0, 2) : 0);
  const auto results_of = [&](int64_t size) { return (size + 2 * padding - kernel) / stride + 1; };
  const WinogradImage shape{.height = results_of(image.height),
                            .width = results_of(image.width),
                            .out_channels = out_channels,
                            .in_height = image.height,
                            .in_width = image.width,
                            .in_channels = channels,
                            .stride = stride,
                            .padding = padding,
                            .kernel = blocks,
                            .extent = kernel};
  Exact<float> weight(out_channels * channels * kernel * kernel);

  // As winograd_cpu.cpp packs: (elements, panels, depth, width).
  const int64_t width = winograd_panel_width(), depth = shape.depth();
  const int64_t panels = (out_channels + width - 1) / width, columns = panels * width;
  const int64_t elements = shape.elements();
  const int64_t taps = blocks * blocks, plane = panels * depth * width;
  Exact<float> packed(elements * plane), plain(taps * plane);
  for (int64_t o = 0; o < columns; ++o) {
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t at = (o / width * depth + k) * width + o % width;
      const int64_t row = k / shape.row_of_block(), column = k % shape.row_of_block() / channels;
      Exact<float> block(taps);
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t y = t / blocks * stride + row, x = t % blocks * stride + column;
        const bool is_there = o < out_channels && y < kernel && x < kernel;
        block[t] = is_there ? weight[((o * channels + k % channels) * kernel + y) * kernel + x] : 0;
        plain[t * plane + at] = block[t];
      }
      winograd_transform_weight(block.data(), blocks, blocks, 1, packed.data() + at, plane);
    }
  }

  const bool has_outliers = integer(0, 1) != 0;
  if (has_outliers)
    for (int64_t k = integer(1, 3); k > 0; --k)
      image.memory[integer(0, image.memory.size() - 1)] = static_cast<T>(5000 * integer(-1, 1));
  bool found = false;
  for (int64_t p = 0; p < image.height * image.width; ++p)
    found |= winograd_has_outliers(image.memory.data() + p * image.column, channels);
  if (found && !has_outliers) expect_close(1, 0, 0, "outliers among small numbers");

  const int64_t tiles = shape.tiles();
  Exact<float> inputs(elements * tiles * depth), products(elements * tiles * columns);
  Image<T> results(shape.height, shape.width, out_channels, integer(0, 2));
  const Epilogue<T> epilogue(shape.height, shape.width, out_channels);
  for (int64_t t = 0; t < tiles; ++t)
    winograd_transform_input(image.read(), 0, shape, t, found, inputs.data() + t * depth,
                             tiles * depth);
  for (int64_t k = 0; k < elements * panels; ++k)
    winograd_multiply_panel(inputs.data() + k / panels * tiles * depth,
                            packed.data() + k * depth * width,
                            products.data() + k / panels * tiles * columns + k % panels * width,
                            tiles, depth, winograd_run(blocks, integer(0, 1)), columns);
  for (int64_t t = 0; t < tiles; ++t) {
    Exact<float> sums(kTileOut * kTileOut * columns);
    std::fill_n(sums.data(), sums.size(), 0.f);
    if (found) winograd_add_outliers(image.read(), 0, shape, t, plain.data(), columns, sums.data());
    winograd_transform_output(products.data() + t * columns, tiles * columns,
                              found ? sums.data() : nullptr, columns, shape, t, epilogue.asked(),
                              results.positions(), 0);
  }
  compare(results, image, weight, kernel, stride, padding, epilogue, sizeof(T) == 4 ? 1e-3 : 2e-1,
          "Winograd's convolution");
}

// --------------------------------------------------------------------------------------- sizes

void sizes() {
  expect_close(static_cast<double>(product({3, 5, 7})), 105, 0, "product");
  for (const int64_t size : {int64_t{1} << 32, kTooLarge / 2, kTooLarge}) {
    if (product({size, size}) != kTooLarge || sum(size, kTooLarge) != kTooLarge) {
      std::fprintf(stderr, "a size wrapped around\n");
      std::exit(1);
    }
  }
  for (const int64_t size : {int64_t{1}, int64_t{1} << 40, kTooLarge / 4})
    for (const int64_t parameter : {int64_t{1}, int64_t{2}, kMaxParameter})
      for (const bool ceil_mode : {false, true}) {
        pooled_size(size, parameter, kMaxParameter, ceil_mode);
        pooled_size(size, kMaxParameter, parameter, ceil_mode);
      }
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 100;
  sizes();
  for (int round = 0; round < rounds; ++round) {
    distance<float>();
    distance<double>();
    distance<c10::Half>();
    distance<c10::BFloat16>();
    max_pool<float>();
    max_pool<double>();
    max_pool<c10::Half>();
    max_pool<c10::BFloat16>();
    direct();
    winograd<float>();
    winograd<c10::Half>();
    winograd<c10::BFloat16>();
  }
  std::printf("%d rounds of the CPU kernels\n", rounds);
  return 0;
}
