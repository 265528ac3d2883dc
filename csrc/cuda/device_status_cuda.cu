// Whether this library's kernels run on a device: asked once, before the first of them, of the CUDA
// runtime that is linked into it. It knows what a list of architectures cannot: whether the driver
// takes the code, or can compile it.
//
// Called by ctypes (lpips_fast/kernels/cuda_device.py); nothing of torch is needed for it.
#include <cuda_runtime.h>

#include "launch.cuh"

namespace lpips_fast::cuda {
namespace {

struct ProbeTask {};

__global__ void probe(const __grid_constant__ ProbeTask) {}

}  // namespace
}  // namespace lpips_fast::cuda

extern "C" {

// Null where they run, or what the CUDA runtime says to it. It loads the library's code.
__attribute__((visibility("default"))) const char* lpips_fast_kernel_fault(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error =
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&lpips_fast::cuda::probe));
    cudaSetDevice(before);
  }
  cudaGetLastError();  // not left for the next call to find
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
}
