// The formulas of one position, in the accumulator's type (csrc/lpips_distance.h has the contract).
//
//   r = 1/(|a| + eps)    a^ = a r    d = sum_c w_c (a^_c - b^_c)^2
//   t_c = 2 g w_c (a^_c - b^_c)      dL/da_c = t_c r - a^_c (sum_k t_k a^_k)/|a|
//
// a^ and b^ are rounded before they are subtracted, where the compiler would otherwise fuse one of
// the products into the difference: so identical inputs give exactly 0, and d(a, b) equals d(b, a)
// to the bit.
#pragma once

#include "vector_load.cuh"

namespace lpips_fast::cuda {

__device__ __forceinline__ float rounded_product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double rounded_product(double x, double y) { return __dmul_rn(x, y); }

template <typename A>
struct Norm {
  A norm, inverse;

  __device__ __forceinline__ Norm(A sum_of_squares, A eps)
      : norm(sqrt(sum_of_squares)), inverse(A(1) / (norm + eps)) {}
};

// (sum_k t_k a^_k)/|a|, or 0 for a zero vector: the norm's derivative there is taken to be 0.
template <typename A>
__device__ __forceinline__ A projection_over_norm(A projection, A norm) {
  return norm > A(0) ? projection / norm : A(0);
}

// dL/da_c; dL/db_c is that of -t and -over_norm. Fused by hand: left to the compiler, the two might
// be fused differently, and the gradients of d(a, b) and d(b, a) would differ in their last bit.
template <typename A>
__device__ __forceinline__ A feature_gradient(A t, A inverse, A unit, A over_norm) {
  return fma(t, inverse, -rounded_product(unit, over_norm));
}

// A zero vector's gradient t/eps is right, finite, and beyond float16's range. There, and only
// there, it is clamped: elsewhere an overflow stays visible (GradScaler looks for it).
template <typename T>
constexpr bool kClampsZeroVectors = std::is_same_v<T, __half>;

template <typename T, typename A>
__device__ __forceinline__ A storable_gradient(A gradient, bool zero_vector) {
  if constexpr (kClampsZeroVectors<T>) {
    constexpr A kLargest = 65504;
    if (zero_vector && gradient > kLargest) return kLargest;
    if (zero_vector && gradient < -kLargest) return -kLargest;
  }
  return gradient;
}

}  // namespace lpips_fast::cuda
