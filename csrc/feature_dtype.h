// The dtypes that images and features may have; kernels are compiled for each of them.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

namespace lpips_fast {

inline bool is_feature_dtype(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

// The dtype of sums over features, and of weights, distances and their gradients.
inline torch::headeronly::ScalarType accumulator_dtype(
    torch::headeronly::ScalarType feature_dtype) {
  using torch::headeronly::ScalarType;
  return feature_dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace lpips_fast
