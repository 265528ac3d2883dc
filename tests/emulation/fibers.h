// CUDA threads on the CPU: one fiber each, block after block. What a kernel may ask of its threads
// (barriers, shuffles, its place in the grid), and the launch that takes the place of <<<>>>.
//
// fibers.cpp is compiled without instrumentation, so that the race detector sees kernels alone.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <functional>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

constexpr int kWarpSize = 32;

// Ends the launch that runs with a std::runtime_error out of Stream::launch; in a kernel or out.
[[noreturn]] void fail(const char* what);

// Waits for the block's other threads.
void block_barrier();

// Waits for the warp's other lanes and returns what the lane that is `offset` away (by xor)
// brought.
uint64_t exchange(uint64_t value, int offset);

// The order in which blocks, a block's warps and a warp's lanes run between barriers. A kernel
// whose result depends on it misses a barrier.
enum class Order { kAscending, kDescending, kShuffled };

// Takes the place of a CUDA stream; a launch runs to its end at once.
struct Stream {
  Order order = Order::kAscending;
  int launches = 0;
  unsigned ends = 0;  // where not 0: of a launch, only so many blocks at either end run

  void launch(const void* kernel, unsigned blocks, int threads, std::function<void()> body);
};

// The address of a kernel, to tell one instantiation from another.
template <typename... Arguments>
const void* address_of(void (*kernel)(Arguments...)) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace emulation
