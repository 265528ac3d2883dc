// Vectors of up to 16 bytes, loaded and stored in one instruction, and the dtypes they hold.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace lpips_fast::cuda {

// float32 for half, bfloat16 and float32 features; float64 for float64.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float to_accumulator(float x) { return x; }
__device__ __forceinline__ double to_accumulator(double x) { return x; }
__device__ __forceinline__ float to_accumulator(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_accumulator(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_accumulator(accumulator_t<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// How many of kSize neighbouring elements, a power of two, one load of at most 16 bytes takes.
template <typename T, int kSize>
constexpr int kElementsPerLoad = kSize * sizeof(T) >= 16 ? 16 / sizeof(T) : kSize;

template <int kBytes>
struct RawVector;
template <>
struct RawVector<2> {
  using type = unsigned short;
};
template <>
struct RawVector<4> {
  using type = unsigned int;
};
template <>
struct RawVector<8> {
  using type = uint2;
};
template <>
struct RawVector<16> {
  using type = uint4;
};

// kSize elements as they lie in memory: half types stay packed in registers and are converted where
// they are used. The address must be a multiple of the vector's size; `index` counts vectors.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  using Raw = typename RawVector<sizeof(T) * kSize>::type;
  using Accumulator = accumulator_t<T>;

  Raw raw;

  __device__ __forceinline__ void load(const T* address, unsigned index = 0) {
    raw = __ldg(reinterpret_cast<const Raw*>(address) + index);
  }

  // From memory that the kernel writes too: not through the cache of what is only read.
  __device__ __forceinline__ void load_written(const T* address) {
    raw = *reinterpret_cast<const Raw*>(address);
  }

  __device__ __forceinline__ void clear() { raw = Raw{}; }

  __device__ __forceinline__ void unpack(Accumulator (&values)[kSize]) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16> && kSize % 2 == 0) {
      unpack_pairs(values);
      return;
    }
    T elements[kSize];
    memcpy(static_cast<void*>(elements), &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = to_accumulator(elements[i]);
  }

  __device__ __forceinline__ static void store(T* address, unsigned index,
                                               const Accumulator (&values)[kSize]) {
    T elements[kSize];
    if constexpr (std::is_same_v<T, __half> && kSize % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kSize; i += 2) {
        const __half2 pair = __floats2half2_rn(values[i], values[i + 1]);
        memcpy(static_cast<void*>(elements + i), &pair, sizeof(pair));
      }
    } else if constexpr (std::is_same_v<T, __nv_bfloat16> && kSize % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kSize; i += 2) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[i], values[i + 1]);
        memcpy(static_cast<void*>(elements + i), &pair, sizeof(pair));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) elements[i] = from_accumulator<T>(values[i]);
    }
    Raw packed;
    memcpy(&packed, elements, sizeof(packed));
    reinterpret_cast<Raw*>(address)[index] = packed;
  }

 private:
  // A bfloat16 is the upper half of a float32: a shift and a mask convert a pair. The empty asm
  // keeps the compiler from taking the word apart first, which costs a third instruction.
  __device__ __forceinline__ void unpack_pairs(float (&values)[kSize]) const {
    uint32_t words[kSize / 2];
    memcpy(words, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      uint32_t word = words[i];
      asm("" : "+r"(word));
      values[2 * i] = __uint_as_float(word << 16);
      values[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
    }
  }
};

// kSize neighbouring elements, 16 bytes a load where there are as many. The address must be a
// multiple of such a load.
template <typename T, int kSize>
__device__ __forceinline__ void load_elements(accumulator_t<T> (&values)[kSize], const T* address) {
  constexpr int kStep = kElementsPerLoad<T, kSize>;
#pragma unroll
  for (int i = 0; i < kSize; i += kStep) {
    Vector<T, kStep> vector;
    vector.load(address, i / kStep);
    accumulator_t<T> part[kStep];
    vector.unpack(part);
#pragma unroll
    for (int j = 0; j < kStep; ++j) values[i + j] = part[j];
  }
}

// The weights of a vector's channels, 16 bytes a load where there are as many.
template <typename A, int kSize>
__device__ __forceinline__ void load_weights(A (&values)[kSize], const A* address, unsigned index) {
  constexpr int kStep = kSize * sizeof(A) >= 16 ? 16 / sizeof(A) : kSize;
#pragma unroll
  for (int i = 0; i < kSize; i += kStep) {
    Vector<A, kStep> vector;
    vector.load(address, index * (kSize / kStep) + i / kStep);
    A part[kStep];
    vector.unpack(part);
#pragma unroll
    for (int j = 0; j < kStep; ++j) values[i + j] = part[j];
  }
}

}  // namespace lpips_fast::cuda
