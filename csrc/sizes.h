// Arithmetic of sizes that does not wrap around, free of torch: a size too large becomes kTooLarge,
// which no memory has.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

namespace lpips_fast {

constexpr int64_t kTooLarge = std::numeric_limits<int64_t>::max();

// Kernels, strides, paddings and numbers of channels, as torch's own convolutions count them.
constexpr int64_t kMaxParameter = std::numeric_limits<int32_t>::max();

// No factor is negative.
inline int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors) {
    if (factor != 0 && result > kTooLarge / factor) return kTooLarge;
    result *= factor;
  }
  return result;
}

// Neither is negative.
inline int64_t sum(int64_t a, int64_t b) { return a > kTooLarge - b ? kTooLarge : a + b; }

}  // namespace lpips_fast
