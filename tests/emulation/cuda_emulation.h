// Runs CUDA kernels on the CPU, as far as those of csrc/cuda need it. What this proves: indexing,
// tails, reductions, barriers that every thread reaches, independence of the order in which warps
// and blocks run, and, of the accesses that a test brings about, the rules of race_detector.h. What
// it cannot show: the GPU's compiler and memory model, coalescing, speed.
//
// Include before the kernels, which find here what nvcc would give them. Half types are the
// toolkit's own, which work on the host. x86-64 or any platform with ucontext.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"
#include "race_detector.h"

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__ static
#define __device__
#define __shared__ static  // one block runs at a time, so static storage is the block's
#define __launch_bounds__(...)
#define __grid_constant__

#define LPIPS_FAST_LAUNCH(kernel, blocks, threads, stream, tasks)                \
  (stream)->launch(emulation::address_of(kernel), blocks, threads,               \
                   [lpips_fast_task = (tasks), lpips_fast_kernel = &*(kernel)] { \
                     lpips_fast_kernel(lpips_fast_task);                         \
                   })

using std::min;  // nvcc has it without a namespace

inline void __syncthreads() { emulation::block_barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) emulation::fail("only shuffles of whole warps are emulated");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::exchange(bits, offset);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Without the compiler's hooks: the detector is told here, of what kind the access is.
template <typename T>
[[gnu::no_sanitize("thread")]] T __ldg(const T* address) {
  emulation::races::look(address, sizeof(T), emulation::races::Access::kReadOnlyCache, true);
  return *address;
}

[[gnu::no_sanitize("thread")]] inline unsigned atomicOr(unsigned* address, unsigned value) {
  emulation::races::look(address, sizeof(unsigned), emulation::races::Access::kAtomic, true);
  const unsigned before = *address;
  *address = before | value;
  return before;
}

inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
