#include "direct_kernels.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "float_vectors.h"

namespace lpips_fast {
namespace {

// As many accumulators as leave registers for the weights and a factor.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kGroup = 12;
#else
constexpr int kGroup = 6;
#endif

constexpr int64_t kPanel = 2 * kLanes;  // channels of results at a time; perhaps kLanes at the end

constexpr int64_t kFloatsPerLine = 16;  // of the cache

// What a group of positions looks at: the number under the first weight of the first of them, and
// how far it is from there to the next row and column, and to the next position.
struct Window {
  const float* first;
  int64_t row, column, position;
};

// A vector of channels of a group's results. Inline by force, in a function that is not: called, it
// would take the sums from memory, and so would the loop that adds to them.
template <size_t positions, int... r>
C10_ALWAYS_INLINE void write_group(std::integer_sequence<int, r...>,
                                   const DirectConvolution& convolution,
                                   const std::array<Vec, positions>& sums, int64_t n, int64_t y,
                                   int64_t x, int64_t c) {
  const int64_t count = std::min(kLanes, convolution.out_channels - c);
  const RowEpilogue<float> epilogue(convolution.epilogue, convolution.results, n, y, x, c, count);
  (epilogue.finish(sums[r], r), ...);
}

// Results of a group of positions: `r...` is 0, 1, ..., positions - 1.
//
// The next group's inputs and this one's results are fetched ahead. The hardware does not foresee
// them: it sees as many streams as there are positions.
template <int vectors, int... r>
C10_NOINLINE void convolve_group(std::integer_sequence<int, r...> indices,
                                 const DirectConvolution& convolution, const Window& window,
                                 int64_t n, int64_t y, int64_t x, int64_t c, const float* packed) {
  constexpr int64_t positions = sizeof...(r);
  std::array<Vec, positions> left{((void)r, Vec(0.f))...}, right = left;
  float* to = convolution.results.at(n, y, x) + c;
  (__builtin_prefetch(to + r * convolution.results.column, 1), ...);
  if constexpr (vectors == 2)
    (__builtin_prefetch(to + r * convolution.results.column + kLanes, 1), ...);
  // A row of the kernel meets one run of numbers where the image's columns lie side by side.
  const int64_t position = window.position;
  const bool is_dense = window.column == convolution.in_channels;
  const int64_t runs = is_dense ? 1 : convolution.kernel;
  const int64_t length = convolution.kernel * convolution.in_channels / runs;
  const bool fetches_next = convolution.kernel == 1 && c == 0;
  for (int64_t i = 0; i < convolution.kernel; ++i) {
    for (int64_t j = 0; j < runs; ++j) {
      const float* from = window.first + i * window.row + j * window.column;
      for (int64_t line = 0; line < length; line += kFloatsPerLine) {
        if (fetches_next) (__builtin_prefetch(from + (r + positions) * position + line), ...);
        const int64_t end = std::min(length, line + kFloatsPerLine);
        for (int64_t k = line; k < end; ++k, packed += vectors * kLanes) {
          const Vec b0 = Vec::loadu(packed);
          const Vec b1 = Vec::loadu(packed + (vectors - 1) * kLanes);
          const auto accumulate = [&](const Vec& a, Vec& on_left, Vec& on_right) {
            on_left = at::vec::fmadd(a, b0, on_left);
            if constexpr (vectors == 2) on_right = at::vec::fmadd(a, b1, on_right);
          };
          (accumulate(Vec(from[r * position + k]), left[r], right[r]), ...);
        }
      }
    }
  }
  write_group(indices, convolution, left, n, y, x, c);
  if constexpr (vectors == 2) write_group(indices, convolution, right, n, y, x, c + kLanes);
}

template <int vectors, int... counts>
void convolve_count(std::integer_sequence<int, counts...>, int64_t count,
                    const DirectConvolution& convolution, const Window& window, int64_t n,
                    int64_t y, int64_t x, int64_t c, const float* packed) {
  ((count == counts + 1 ? convolve_group<vectors>(std::make_integer_sequence<int, counts + 1>(),
                                                  convolution, window, n, y, x, c, packed)
                        : void()),
   ...);
}

// Of `count` positions from (y, x) on. Where they reach over an image's border, what they look at
// is copied, with zeros there: the same numbers in the same order as elsewhere.
Window window_of(const DirectConvolution& convolution, int64_t n, int64_t y, int64_t x,
                 int64_t count, std::vector<float>& copy) {
  const Positions<const float>& images = convolution.images;
  const int64_t kernel = convolution.kernel, channels = convolution.in_channels;
  const int64_t stride = convolution.stride, height = convolution.in_height;
  const int64_t top = y * stride - convolution.padding, left = x * stride - convolution.padding;
  if (convolution.padding == 0 || (top >= 0 && top + kernel <= height && left >= 0 &&
                                   left + (count - 1) * stride + kernel <= convolution.in_width))
    return {images.at(n, top, left), images.row, images.column, stride * images.column};
  const int64_t step = std::min(stride, kernel);  // what lies between positions is left out
  const int64_t columns = (count - 1) * step + kernel;
  copy.assign(kernel * columns * channels, 0.f);
  for (int64_t i = std::max<int64_t>(0, -top); i < std::min(kernel, height - top); ++i) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t begin = left + r * stride;
      const int64_t first = std::max<int64_t>(0, -begin);
      const int64_t last = std::min(kernel, convolution.in_width - begin);
      for (int64_t j = first; j < last; ++j)
        std::copy_n(images.at(n, top + i, begin + j), channels,
                    copy.data() + (i * columns + r * step + j) * channels);
    }
  }
  return {copy.data(), columns * channels, channels, step * channels};
}

}  // namespace

int64_t direct_packed_channels(int64_t out_channels) {
  return (out_channels + kLanes - 1) / kLanes * kLanes;
}

void direct_pack(const float* weight, const int64_t (&strides)[4], int64_t kernel,
                 int64_t in_channels, int64_t out_channels, float* packed) {
  for (int64_t c = 0; c < out_channels; c += kPanel) {
    const int64_t width = std::min(kPanel, direct_packed_channels(out_channels - c));
    for (int64_t i = 0; i < kernel; ++i)
      for (int64_t j = 0; j < kernel; ++j)
        for (int64_t k = 0; k < in_channels; ++k)
          for (int64_t o = c; o < c + width; ++o)
            *packed++ =
                o < out_channels
                    ? weight[o * strides[0] + k * strides[1] + i * strides[2] + j * strides[3]]
                    : 0.f;
  }
}

void direct_convolve_rows(const DirectConvolution& convolution, int64_t n, int64_t first,
                          int64_t last) {
  constexpr auto counts = std::make_integer_sequence<int, kGroup>();
  // Groups of nearly the same size: a small one uses the machine badly.
  const int64_t groups = (convolution.width + kGroup - 1) / kGroup;
  const int64_t depth = convolution.kernel * convolution.kernel * convolution.in_channels;
  std::vector<float> copy;
  for (int64_t y = first; y < last; ++y) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t x = g * convolution.width / groups;
      const int64_t count = (g + 1) * convolution.width / groups - x;
      const Window window = window_of(convolution, n, y, x, count, copy);
      // All channels of a group in a row: what is written lies together.
      for (int64_t c = 0; c < convolution.out_channels; c += kPanel) {
        const float* packed = convolution.packed + c * depth;
        convolution.out_channels - c > kLanes
            ? convolve_count<2>(counts, count, convolution, window, n, y, x, c, packed)
            : convolve_count<1>(counts, count, convolution, window, n, y, x, c, packed);
      }
    }
  }
}

}  // namespace lpips_fast
