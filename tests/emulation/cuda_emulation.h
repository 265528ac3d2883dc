// Runs CUDA kernels on the CPU, as far as those of csrc/cuda need it: one fiber per CUDA thread,
// block after block. What this proves: indexing, tails, reductions, barriers that every thread
// reaches, independence of the order in which warps and blocks run. What it cannot show: true
// races, the memory model, coalescing, the compiler for the GPU, speed.
//
// Include before the kernels, which find here what nvcc would give them. Half types are the
// toolkit's own, which work on the host. x86-64 or any platform with ucontext.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

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

using std::min;  // nvcc has it without a namespace

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace emulation {

constexpr int kWarpSize = 32;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u)\n", what, blockIdx.x);
  std::abort();
}

// The order in which blocks, a block's warps and a warp's lanes run between barriers. A kernel
// whose result depends on it misses a barrier.
enum class Order { kAscending, kDescending, kShuffled };

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  State state = State::kDone;
  int shuffle_offset = 0;      // the shuffle it waits in, or 0
  uint64_t exchanged[2] = {};  // what it hands to a shuffle, alternately
  unsigned shuffles = 0;
  std::unique_ptr<char[]> stack;
};

struct Scheduler {
  static constexpr size_t kStackBytes = 256 << 10;
  std::vector<Fiber> fibers;
  jmp_buf resume;
  int current = 0;
  std::function<void()> body;
};
inline Scheduler scheduler;

// A fiber lives for many blocks: it starts with makecontext, and is switched to and from with
// setjmp and longjmp, which (unlike swapcontext) make no system call.
inline void fiber_main() {
  for (;;) {
    scheduler.body();
    Fiber& self = scheduler.fibers[scheduler.current];
    self.state = State::kDone;
    if (_setjmp(self.resume) == 0) _longjmp(scheduler.resume, 1);
  }
}

inline void wait_at(State barrier) {
  Fiber& self = scheduler.fibers[scheduler.current];
  self.state = barrier;
  if (_setjmp(self.resume) == 0) _longjmp(scheduler.resume, 1);
}

inline void run_fiber(int index) {
  Fiber& fiber = scheduler.fibers[index];
  scheduler.current = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  if (_setjmp(scheduler.resume) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  fiber.stack = std::make_unique<char[]>(Scheduler::kStackBytes);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = Scheduler::kStackBytes;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

// Runs a warp until all its lanes are at a block barrier or done.
inline void run_warp(int first, const std::vector<int>& lanes) {
  for (;;) {
    for (int lane : lanes)
      if (scheduler.fibers[first + lane].state == State::kReady) run_fiber(first + lane);
    int waiting = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Fiber& fiber = scheduler.fibers[first + lane];
      waiting += fiber.state == State::kAtWarpBarrier;
      if (fiber.shuffle_offset != scheduler.fibers[first].shuffle_offset)
        fail("lanes of a warp are in different shuffles");
    }
    if (waiting == 0) return;
    if (waiting != kWarpSize) fail("a warp's shuffle or barrier misses some of its lanes");
    for (int lane = 0; lane < kWarpSize; ++lane)
      scheduler.fibers[first + lane].state = State::kReady;
  }
}

inline std::vector<int> ordered(int count, Order order, std::mt19937& random) {
  std::vector<int> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == Order::kDescending) std::reverse(indices.begin(), indices.end());
  if (order == Order::kShuffled) std::shuffle(indices.begin(), indices.end(), random);
  return indices;
}

// Takes the place of a CUDA stream; a launch runs to its end at once.
struct Stream {
  Order order = Order::kAscending;
  int launches = 0;
  unsigned ends = 0;  // where not 0: of a launch, only so many blocks at either end run

  void launch(unsigned blocks, int threads, std::function<void()> kernel) {
    if (threads % kWarpSize != 0) fail("blocks must be whole warps");
    ++launches;
    std::mt19937 random(launches);
    gridDim = dim3(blocks);
    blockDim = dim3(threads);
    scheduler.body = std::move(kernel);
    if (scheduler.fibers.size() < static_cast<size_t>(threads)) scheduler.fibers.resize(threads);
    const int warps = threads / kWarpSize;
    for (int block : ordered(static_cast<int>(blocks), order, random)) {
      const unsigned at = static_cast<unsigned>(block);
      if (ends != 0 && at >= ends && at + ends < blocks) continue;
      blockIdx = {static_cast<unsigned>(block), 0, 0};
      for (int t = 0; t < threads; ++t) scheduler.fibers[t].state = State::kReady;
      for (bool done = false; !done;) {
        for (int warp : ordered(warps, order, random))
          run_warp(warp * kWarpSize, ordered(kWarpSize, order, random));
        int finished = 0, waiting = 0;
        for (int t = 0; t < threads; ++t) {
          finished += scheduler.fibers[t].state == State::kDone;
          waiting += scheduler.fibers[t].state == State::kAtBlockBarrier;
        }
        if (waiting != 0 && finished != 0) fail("some threads end while others are at a barrier");
        for (int t = 0; t < threads && waiting; ++t) scheduler.fibers[t].state = State::kReady;
        done = finished == threads;
      }
    }
  }
};

}  // namespace emulation

inline void __syncthreads() { emulation::wait_at(emulation::State::kAtBlockBarrier); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  using namespace emulation;
  if (mask != 0xffffffffu) fail("only shuffles of whole warps are emulated");
  const int self = scheduler.current;
  // Two alternating slots: a lane may run ahead to the next shuffle while others still read.
  const unsigned slot = scheduler.fibers[self].shuffles++ % 2;
  std::memcpy(&scheduler.fibers[self].exchanged[slot], &value, sizeof(T));
  scheduler.fibers[self].shuffle_offset = offset;
  wait_at(State::kAtWarpBarrier);
  scheduler.fibers[self].shuffle_offset = 0;
  T received;
  std::memcpy(&received, &scheduler.fibers[self ^ offset].exchanged[slot], sizeof(T));
  return received;
}

template <typename T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) emulation::fail("a misaligned load");
  return *address;
}

inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
