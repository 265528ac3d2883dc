// Loads and stores of a run of features as accumulator vectors, on top of at::vec.
//
// A "step" is as many features as one SIMD register of the feature's dtype holds: one accumulator
// vector for float and double, two for the 16-bit types, which are widened on load and rounded on
// store. A step at the end of a run takes a count; lanes beyond it load as zero and are not stored.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "distance_kernels.h"

namespace lpips_fast {

using at::vec::Vectorized;

template <typename feature_t>
struct Lanes {
  using acc_t = accumulator_t<feature_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int64_t kStep = Vectorized<feature_t>::size();
  static constexpr int kVecs = static_cast<int>(kStep / Vec::size());
  using Step = std::array<Vec, kVecs>;

  static Step load(const feature_t* from, int64_t count) {
    if constexpr (kVecs == 1) {
      return {count == kStep ? Vec::loadu(from) : Vec::loadu(from, count)};
    } else {
      const auto packed = count == kStep ? Vectorized<feature_t>::loadu(from)
                                         : Vectorized<feature_t>::loadu(from, count);
      const auto [low, high] = at::vec::convert_to_float<feature_t>(packed);
      return {low, high};
    }
  }

  static void store(feature_t* to, const Step& step, int64_t count) {
    if constexpr (kVecs == 1) {
      count == kStep ? step[0].store(to) : step[0].store(to, static_cast<int>(count));
    } else {
      const auto packed = at::vec::convert_from_float<feature_t>(step[0], step[1]);
      count == kStep ? packed.store(to) : packed.store(to, static_cast<int>(count));
    }
  }

  // Accumulator-typed data beside the features: weights, distances, their gradients.
  static Step load_acc(const acc_t* from, int64_t count) {
    Step step;
    for (int v = 0; v < kVecs; ++v) {
      const int64_t left = count - v * Vec::size();
      step[v] = left >= Vec::size() ? Vec::loadu(from + v * Vec::size())
                : left > 0          ? Vec::loadu(from + v * Vec::size(), left)
                                    : Vec(acc_t(0));
    }
    return step;
  }

  static void store_acc(acc_t* to, const Step& step, int64_t count) {
    for (int v = 0; v < kVecs; ++v) {
      const int64_t left = std::min<int64_t>(count - v * Vec::size(), Vec::size());
      if (left > 0) step[v].store(to + v * Vec::size(), static_cast<int>(left));
    }
  }

  static Step fill(acc_t value) {
    Step step;
    step.fill(Vec(value));
    return step;
  }
};

template <typename Vec>
inline typename Vec::value_type sum_of_lanes(const Vec& v) {
  return at::vec::vec_reduce_all<typename Vec::value_type>([](Vec& x, Vec& y) { return x + y; }, v);
}

}  // namespace lpips_fast
