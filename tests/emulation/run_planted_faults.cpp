// Small kernels with a fault each, and twins without it, to show that the emulation sees the one
// and is silent of the other. tests/kernels/test_race_detector.py runs them.
// clang-format off: first of all, what the kernels find instead of nvcc's.
#include "cuda_emulation.h"
// clang-format on

#include <exception>
#include <map>
#include <string>

#include "../../csrc/cuda/vector_load.cuh"
#include "guarded_memory.h"

namespace planted {

constexpr int kThreads = 64;

struct PlantedTask {
  float* values;  // kThreads elements a block
  int blocks;
};

__device__ float* of_block(const PlantedTask& task) { return task.values + blockIdx.x * kThreads; }

// Each thread takes what its neighbour left in shared memory.
template <bool kBarrier>
__global__ void take_from_neighbour(const __grid_constant__ PlantedTask task) {
  __shared__ float shared[kThreads];
  const int t = threadIdx.x;
  shared[t] = of_block(task)[t];
  if constexpr (kBarrier) __syncthreads();
  of_block(task)[t] = shared[kThreads - 1 - t];
}

// A buffer that is used twice: the second round's writes wait for the first round's reads.
template <bool kBarrier>
__global__ void use_buffer_twice(const __grid_constant__ PlantedTask task) {
  __shared__ float shared[kThreads];
  const int t = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    shared[t] = of_block(task)[t] + round;
    __syncthreads();
    sum += shared[(t + 1) % kThreads];
    if constexpr (kBarrier) __syncthreads();
  }
  of_block(task)[t] = sum;
}

// Lanes of one warp, which run side by side: a shuffle is no barrier of memory.
template <bool kBarrier>
__global__ void order_by_shuffle(const __grid_constant__ PlantedTask task) {
  __shared__ float shared[kThreads];
  const int t = threadIdx.x;
  shared[t] = of_block(task)[t];
  if constexpr (kBarrier) {
    __syncthreads();
  } else {
    __shfl_xor_sync(0xffffffffu, t, 1);
  }
  of_block(task)[t] = shared[t ^ 1];
}

// Also of one value: whoever comes last leaves the same, and the order is still nobody's.
template <bool kAtomic>
__global__ void write_the_same(const __grid_constant__ PlantedTask task) {
  auto* flag = reinterpret_cast<unsigned*>(task.values);
  if constexpr (kAtomic) {
    atomicOr(flag, 1u);
  } else {
    *flag = 1u;
  }
}

// A sum over blocks by the last of them, without a launch between.
template <bool kOwnBlock>
__global__ void read_other_blocks(const __grid_constant__ PlantedTask task) {
  float* own = of_block(task);
  own[threadIdx.x] = 1;
  __syncthreads();
  const float* from = kOwnBlock ? own : task.values;
  if (threadIdx.x == 0) own[0] = from[1];
}

// Written by a block that an earlier one has read: blocks come in any order.
template <bool kOwnBlock>
__global__ void write_what_a_block_read(const __grid_constant__ PlantedTask task) {
  const int t = threadIdx.x, block = blockIdx.x;
  float* own = task.values + block * kThreads;
  const float* from = kOwnBlock ? own : task.values + (block + 1) % task.blocks * kThreads;
  const float value = from[t];
  __syncthreads();
  own[t] = value + 1;
}

template <bool kWrites>
__global__ void read_before_writing(const __grid_constant__ PlantedTask task) {
  __shared__ float shared[kThreads];
  const int t = threadIdx.x;
  if (kWrites || t != 5) shared[t] = 1;
  __syncthreads();
  of_block(task)[t] = shared[t];
}

// Left by the block before: on a GPU it may have run elsewhere.
template <bool kEveryBlock>
__global__ void keep_shared_memory(const __grid_constant__ PlantedTask task) {
  __shared__ float shared[kThreads];
  const int t = threadIdx.x;
  if (kEveryBlock || blockIdx.x == 0) shared[t] = 1;
  __syncthreads();
  of_block(task)[t] = shared[t];
}

template <bool kPlainLoad>
__global__ void read_cache_of_written(const __grid_constant__ PlantedTask task) {
  float* own = of_block(task) + threadIdx.x;
  *own = 2;
  *own += kPlainLoad ? *static_cast<volatile float*>(own) : __ldg(own);
}

template <bool kAligned>
__global__ void store_vector(const __grid_constant__ PlantedTask task) {
  if (threadIdx.x != 0) return;
  float* to = of_block(task) + (kAligned ? 4 : 5);
  const float values[] = {1, 2, 3, 4};
  lpips_fast::cuda::Vector<float, 4>::store(to, 0, values);
}

template <bool kAligned>
__global__ void load_vector(const __grid_constant__ PlantedTask task) {
  if (threadIdx.x != 0) return;
  const uint2 pair = __ldg(reinterpret_cast<const uint2*>(of_block(task) + (kAligned ? 4 : 5)));
  of_block(task)[0] = __uint_as_float(pair.x);
}

template <bool kAll>
__global__ void some_miss_the_barrier(const __grid_constant__ PlantedTask task) {
  if (!kAll && threadIdx.x >= 32) return;
  __syncthreads();
  of_block(task)[threadIdx.x] = 1;
}

template <bool kAll>
__global__ void some_miss_the_shuffle(const __grid_constant__ PlantedTask task) {
  float value = 1;
  if (kAll || threadIdx.x % 32 < 16) value = __shfl_xor_sync(0xffffffffu, value, 1);
  of_block(task)[threadIdx.x] = value;
}

template <bool kSame>
__global__ void different_shuffles(const __grid_constant__ PlantedTask task) {
  float value = threadIdx.x;
  if (kSame || threadIdx.x % 2 == 0) {
    value = __shfl_xor_sync(0xffffffffu, value, 2);
  } else {
    value = __shfl_xor_sync(0xffffffffu, value, 4);
  }
  of_block(task)[threadIdx.x] = value;
}

}  // namespace planted

namespace {

using namespace planted;
using Kernel = void (*)(PlantedTask);
#define WITH_TWIN(name)                \
  {                                    \
    #name, { name<false>, name<true> } \
  }
const std::map<std::string, std::pair<Kernel, Kernel>> kKernels = {
    WITH_TWIN(take_from_neighbour),   WITH_TWIN(use_buffer_twice),
    WITH_TWIN(order_by_shuffle),      WITH_TWIN(write_the_same),
    WITH_TWIN(read_other_blocks),     WITH_TWIN(write_what_a_block_read),
    WITH_TWIN(read_before_writing),   WITH_TWIN(keep_shared_memory),
    WITH_TWIN(read_cache_of_written), WITH_TWIN(store_vector),
    WITH_TWIN(load_vector),           WITH_TWIN(some_miss_the_barrier),
    WITH_TWIN(some_miss_the_shuffle), WITH_TWIN(different_shuffles),
};

std::string error;

}  // namespace

extern "C" {

const char* last_error() { return error.c_str(); }

// Names separated by spaces.
const char* planted_faults() {
  static const std::string names = [] {
    std::string all;
    for (const auto& [name, twins] : kKernels) all += (all.empty() ? "" : " ") + name;
    return all;
  }();
  return names.c_str();
}

// 0, or -1 where the launch was ended (see last_error).
int run_planted(const char* name, int faultless, void* values, int blocks, int order) {
  const auto& [faulty, twin] = kKernels.at(name);
  const Kernel kernel = faultless ? twin : faulty;
  emulation::Stream stream{static_cast<emulation::Order>(order)};
  const PlantedTask task{static_cast<float*>(values), blocks};
  try {
    LPIPS_FAST_LAUNCH(kernel, blocks, kThreads, &stream, task);
    return 0;
  } catch (const std::exception& exception) {
    error = exception.what();
    return -1;
  }
}
}
