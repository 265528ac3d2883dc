// Lets g++ compile torch's side of the CUDA operators (csrc/cuda/*.cu) and run it on CPU tensors:
// the CUDA runtime, torch's device guard and its current stream are played here, and launches go to
// the emulation. The operators register as CPU implementations of EMULATED_OPERATORS, a library of
// operators of their own, with the schemas of csrc/ops.cpp.
//
// Include before csrc/cuda/*.cu, in one file with them.
#pragma once

#include <cuda_runtime.h>

#include "cuda_emulation.h"

// What torch hands out as its current stream.
struct CUstream_st : emulation::Stream {
  void launch(const void* kernel, unsigned blocks, int threads, std::function<void()> body);
};

#include "../../csrc/stable_abi.h"

#ifndef EMULATED_OPERATORS
#error "name the library of operators"
#endif
#undef STABLE_TORCH_LIBRARY
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY(name, m) EMULATED_SCHEMAS(EMULATED_OPERATORS, m)
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m) EMULATED_KERNELS(EMULATED_OPERATORS, m, C10_UID)
#define EMULATED_SCHEMAS(name, m) STABLE_TORCH_LIBRARY_FRAGMENT(name, m)
#define EMULATED_KERNELS(name, m, uid) _STABLE_TORCH_LIBRARY_IMPL(name, CPU, m, uid)

namespace played {

// What a test plays and counts.
struct Device {
  static constexpr int kDevices = 2;
  int current = 0;
  CUstream_st stream;
  int multiprocessors = 4;
  int error = cudaSuccess;  // of the next question for the last error, and of device 1's kernels
  int guards = 0, guards_held = 0, streams = 0, unguarded_launches = 0;
};
inline Device& device = *new Device;

}  // namespace played

inline void CUstream_st::launch(const void* kernel, unsigned blocks, int threads,
                                std::function<void()> body) {
  played::device.unguarded_launches += played::device.guards_held == 0;
  emulation::Stream::launch(kernel, blocks, threads, std::move(body));
}

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++played::device.guards;
  ++played::device.guards_held;
  *guard = reinterpret_cast<DeviceGuardHandle>(&played::device);
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --played::device.guards_held;
  return 0;
}

// Weak, as csrc/cuda/torch_side.h declares it later.
[[gnu::weak]] AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  ++played::device.streams;
  *stream = &played::device.stream;
  return 0;
}

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

cudaError_t cudaGetLastError() {
  const int error = played::device.error;
  played::device.error = cudaSuccess;
  return static_cast<cudaError_t>(error);
}

const char* cudaGetErrorString(cudaError_t) { return "a played error"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = played::device.multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = played::device.current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device >= played::Device::kDevices) return cudaErrorInvalidDevice;
  played::device.current = device;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return static_cast<cudaError_t>(played::device.current == 0 ? cudaSuccess : played::device.error);
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  played::device.unguarded_launches += played::device.guards_held == 0;
  ++played::device.stream.launches;
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

// ------------------------------------------------------------------------------ for the tests

void play(int multiprocessors, int order, int error) {
  played::device.multiprocessors = multiprocessors;
  played::device.stream.order = static_cast<emulation::Order>(order);
  played::device.error = error;
}

// Since it was asked last: launches, guards taken, guards still held, streams asked for, launches
// without a guard.
void count_calls(int* counts) {
  played::Device& d = played::device;
  for (int* count :
       {&d.stream.launches, &d.guards, &d.guards_held, &d.streams, &d.unguarded_launches}) {
    *counts++ = *count;
    if (count != &d.guards_held) *count = 0;
  }
}
}
