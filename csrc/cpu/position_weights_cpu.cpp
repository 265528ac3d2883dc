// From a mask over pixels to weights of a layer's positions: of each position's cell the mean of
// the mask, over the mean of the whole mask.
//
//   position_weights(mask, heights, widths, dtype) -> for every grid (N, 1, heights[g], widths[g])
//
// A grid of h x w positions divides the H x W pixels of the mask (N, 1, H, W) into as many cells:
// cell i begins at i H / h. Counted in units of 1/h of a pixel everything is whole, so that sums of
// whole numbers are exact, and the weights of a mask that is one number everywhere are all
// exactly 1. No term is negative: the weight of a cell where the mask is 0 is 0.
//
// A mask that has no weights, since it is all 0, negative somewhere or not finite, has NaN for all.
//
// Memory: reads the mask once, writes it in double, and reads that once for every grid, row by row.
#include <algorithm>
#include <limits>
#include <vector>

#include "../allocation.h"
#include "dispatch.h"
#include "parallel.h"

namespace lpips_fast {
namespace {

// One mask in double, its largest value 1, and its sum, NaN where it has no weights. Each column
// has a sum of its own, which vectorises.
template <typename in_t>
double scale_by_largest(const in_t* mask, int64_t height, int64_t width, double* values) {
  std::vector<double> least(width, std::numeric_limits<double>::infinity());
  std::vector<double> most(width, 0), sum(width, 0);
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) {
      const double value = static_cast<double>(mask[y * width + x]);
      values[y * width + x] = value;
      sum[x] += value;
      least[x] = value < least[x] ? value : least[x];
      most[x] = value > most[x] ? value : most[x];
    }
  const double largest = *std::max_element(most.begin(), most.end());
  if (!(largest > 0) || *std::min_element(least.begin(), least.end()) < 0)
    return std::numeric_limits<double>::quiet_NaN();
  if (largest != 1) {
    std::fill(sum.begin(), sum.end(), 0);
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x) sum[x] += values[y * width + x] /= largest;
  }
  double total = 0;  // of infinity and NaN: NaN
  for (const double of_column : sum) total += of_column;
  return total;
}

// Along one axis: the pixels of every cell, and how much of each lies in it, in units of 1/count.
struct Cells {
  struct Pixel {
    int64_t index;
    double part;
  };
  std::vector<Pixel> pixels;
  std::vector<int64_t> first;  // of a cell's, in `pixels`; one more behind the last cell

  Cells(int64_t size, int64_t count) {
    for (int64_t cell = 0; cell < count; ++cell) {
      const int64_t begin = cell * size, end = begin + size;
      first.push_back(static_cast<int64_t>(pixels.size()));
      for (int64_t pixel = begin / count; pixel * count < end; ++pixel)
        pixels.push_back({pixel, static_cast<double>(std::min(end, (pixel + 1) * count) -
                                                     std::max(begin, pixel * count))});
    }
    first.push_back(static_cast<int64_t>(pixels.size()));
  }

  int64_t count() const { return static_cast<int64_t>(first.size()) - 1; }
};

// values (height, width) -> out (cells down, cells across)
template <typename out_t>
void weights_of_grid(const double* values, double total, int64_t width, const Cells& down,
                     const Cells& across, out_t* out) {
  std::vector<double> row(width);
  for (int64_t i = 0; i < down.count(); ++i) {
    std::fill(row.begin(), row.end(), 0);
    for (int64_t k = down.first[i]; k < down.first[i + 1]; ++k) {
      const double part = down.pixels[k].part;
      const double* pixels = values + down.pixels[k].index * width;
      for (int64_t x = 0; x < width; ++x) row[x] += part * pixels[x];
    }
    for (int64_t j = 0; j < across.count(); ++j) {
      double sum = 0;
      for (int64_t k = across.first[j]; k < across.first[j + 1]; ++k)
        sum += across.pixels[k].part * row[across.pixels[k].index];
      out[i * across.count() + j] = static_cast<out_t>(sum / total);
    }
  }
}

void check_mask(const Tensor& mask, const std::vector<int64_t>& heights,
                const std::vector<int64_t>& widths, ScalarType dtype) {
  Operands(Backend::kCPU).check("mask", mask);
  LPIPS_FAST_CHECK(
      mask.dim() == 4 && mask.size(1) == 1 && mask.size(2) > 0 && mask.size(3) > 0 &&
          (mask.scalar_type() == ScalarType::Bool || is_feature_dtype(mask.scalar_type())),
      "mask must be (N, 1, H, W), bool or floating point, got ", description_of(mask));
  LPIPS_FAST_CHECK(heights.size() == widths.size(),
                   "expected a height and a width for every grid, "
                   "got ",
                   heights.size(), " and ", widths.size());
  LPIPS_FAST_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                   "weights are float32 or float64, not ", torch::headeronly::toString(dtype));
  check_parameter("the mask's height", mask.size(2), 1);
  check_parameter("the mask's width", mask.size(3), 1);
  for (const int64_t height : heights) check_parameter("a grid's height", height, 1);
  for (const int64_t width : widths) check_parameter("a grid's width", width, 1);
}

TensorList position_weights(Tensor mask, std::vector<int64_t> heights, std::vector<int64_t> widths,
                            ScalarType dtype) {
  check_mask(mask, heights, widths, dtype);
  const int64_t batch = mask.size(0), height = mask.size(2), width = mask.size(3);
  const auto grids = static_cast<int64_t>(heights.size()), pixels = height * width;
  TensorList results;
  for (int64_t g = 0; g < grids; ++g)
    results.push_back(empty({batch, 1, heights[g], widths[g]}, dtype, mask.device()));
  if (batch == 0) return results;

  mask = dense(mask);
  std::vector<double> values = zeros<double>(product({batch, pixels})), totals(batch);
  const auto scale = [&](const auto* from) {
    parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n)
        totals[n] = scale_by_largest(from + n * pixels, height, width, values.data() + n * pixels);
    });
  };
  if (mask.scalar_type() == ScalarType::Bool) {
    scale(static_cast<const uint8_t*>(mask.const_data_ptr()));
  } else {
    dispatch_feature_dtype(mask.scalar_type(), [&](auto element) {
      scale(static_cast<const decltype(element)*>(mask.const_data_ptr()));
    });
  }
  std::vector<Cells> down, across;
  for (int64_t g = 0; g < grids; ++g) {
    down.emplace_back(height, heights[g]);
    across.emplace_back(width, widths[g]);
  }
  dispatch_feature_dtype(dtype, [&](auto element) {
    using out_t = decltype(element);
    std::vector<out_t*> to;
    for (const Tensor& result : results)
      to.push_back(static_cast<out_t*>(result.mutable_data_ptr()));
    parallel_for(0, batch * grids, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t n = task / grids, g = task % grids;
        weights_of_grid(values.data() + n * pixels, totals[n], width, down[g], across[g],
                        to[g] + n * heights[g] * widths[g]);
      }
    });
  });
  return results;
}

}  // namespace
}  // namespace lpips_fast

STABLE_TORCH_LIBRARY_IMPL(lpips_fast, CPU, m) {
  m.impl("position_weights", TORCH_BOX(&lpips_fast::position_weights));
}
