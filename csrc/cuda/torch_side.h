// What the CUDA operators share on torch's side: the current stream, errors, dtypes. Stable ABI
// only, so that one build serves every torch from 2.10 on, and so that it compiles, links and loads
// without a GPU and with a torch built without CUDA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../checks.h"

// Only a torch built with CUDA has this function; weak, so that the library loads in any.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace lpips_fast::cuda {

inline void check(cudaError_t error) {
  LPIPS_FAST_CHECK(error == cudaSuccess, "lpips_fast: CUDA error: ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int32_t device) {
  LPIPS_FAST_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                   "lpips_fast: this torch is built without CUDA");
  void* stream = nullptr;
  LPIPS_FAST_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == TORCH_SUCCESS,
                   "lpips_fast: torch has no current stream for CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Calls body(feature_t{}) for the dtype; the operator has refused all others.
template <typename Body>
void dispatch_feature_dtype(torch::headeronly::ScalarType dtype, const Body& body) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(__half{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      return body(float{});
  }
}

}  // namespace lpips_fast::cuda
