// From a runtime dtype to a C++ type, for the dtypes that have CPU kernels.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../feature_dtype.h"

namespace lpips_fast {

// Calls body(feature_t{}); the caller has refused all other dtypes.
template <typename Body>
void dispatch_feature_dtype(torch::headeronly::ScalarType dtype, const Body& body) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(c10::Half{});
    case ScalarType::BFloat16:
      return body(c10::BFloat16{});
    default:
      return body(float{});
  }
}

}  // namespace lpips_fast
