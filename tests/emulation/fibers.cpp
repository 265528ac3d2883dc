#include "fibers.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "race_detector.h"

// Not in .bss, where the detector takes everything for shared memory.
[[gnu::section(".data")]] uint3 threadIdx;
[[gnu::section(".data")]] uint3 blockIdx;
[[gnu::section(".data")]] dim3 blockDim;
[[gnu::section(".data")]] dim3 gridDim;

namespace emulation {
namespace {

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
  bool in_kernel = false;
  const char* failure = nullptr;  // of the fiber that has just stopped
  std::function<void()> body;
};

Scheduler& scheduler = *new Scheduler;  // not in .bss, as above

[[noreturn]] void back_to_scheduler() {
  races::leave();
  scheduler.in_kernel = false;
  _longjmp(scheduler.resume, 1);
}

// A fiber lives for many blocks: it starts with makecontext, and is switched to and from with
// setjmp and longjmp, which (unlike swapcontext) make no system call.
void fiber_main() {
  for (;;) {
    scheduler.body();
    Fiber& self = scheduler.fibers[scheduler.current];
    self.state = State::kDone;
    if (_setjmp(self.resume) == 0) back_to_scheduler();
  }
}

void wait_at(State barrier) {
  Fiber& self = scheduler.fibers[scheduler.current];
  self.state = barrier;
  if (_setjmp(self.resume) == 0) back_to_scheduler();
}

void run_fiber(int index) {
  Fiber& fiber = scheduler.fibers[index];
  scheduler.current = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  if (_setjmp(scheduler.resume) != 0) {
    if (scheduler.failure != nullptr) fail(scheduler.failure);
    return;
  }
  scheduler.in_kernel = true;
  races::enter(index);
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
void run_warp(int first, const std::vector<int>& lanes) {
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
    if (waiting != kWarpSize) fail("a warp's shuffle misses some of its lanes");
    for (int lane = 0; lane < kWarpSize; ++lane)
      scheduler.fibers[first + lane].state = State::kReady;
  }
}

std::vector<int> ordered(int count, Order order, std::mt19937& random) {
  std::vector<int> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == Order::kDescending) std::reverse(indices.begin(), indices.end());
  if (order == Order::kShuffled) std::shuffle(indices.begin(), indices.end(), random);
  return indices;
}

void run_block(int threads, Order order, std::mt19937& random) {
  const int warps = threads / kWarpSize;
  for (int t = 0; t < threads; ++t) scheduler.fibers[t].state = State::kReady;
  for (;;) {
    for (int warp : ordered(warps, order, random))
      run_warp(warp * kWarpSize, ordered(kWarpSize, order, random));
    int finished = 0;
    for (int t = 0; t < threads; ++t) finished += scheduler.fibers[t].state == State::kDone;
    if (finished == threads) return;
    if (finished != 0) fail("some threads end while others are at a barrier");
    for (int t = 0; t < threads; ++t) scheduler.fibers[t].state = State::kReady;
    races::pass_barrier();
  }
}

}  // namespace

void fail(const char* what) {
  if (scheduler.in_kernel) {  // not thrown from here: an exception does not leave a fiber's stack
    scheduler.failure = what;
    back_to_scheduler();
  }
  scheduler.failure = nullptr;
  scheduler.fibers.clear();  // in the middle of a kernel, all of them
  throw std::runtime_error("CUDA emulation: " + std::string(what) + " (block " +
                           std::to_string(blockIdx.x) + ")");
}

void block_barrier() { wait_at(State::kAtBlockBarrier); }

uint64_t exchange(uint64_t value, int offset) {
  const int self = scheduler.current;
  // Two alternating slots: a lane may run ahead to the next shuffle while others still read.
  const unsigned slot = scheduler.fibers[self].shuffles++ % 2;
  scheduler.fibers[self].exchanged[slot] = value;
  scheduler.fibers[self].shuffle_offset = offset;
  wait_at(State::kAtWarpBarrier);
  scheduler.fibers[self].shuffle_offset = 0;
  return scheduler.fibers[self ^ offset].exchanged[slot];
}

void Stream::launch(const void* kernel, unsigned blocks, int threads, std::function<void()> body) {
  if (threads % kWarpSize != 0) fail("blocks must be whole warps");
  ++launches;
  std::mt19937 random(launches);
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  scheduler.body = std::move(body);
  if (scheduler.fibers.size() < static_cast<size_t>(threads)) scheduler.fibers.resize(threads);
  races::start_launch(kernel);
  for (int block : ordered(static_cast<int>(blocks), order, random)) {
    const unsigned at = static_cast<unsigned>(block);
    if (ends != 0 && at >= ends && at + ends < blocks) continue;
    blockIdx = {at, 0, 0};
    races::start_block(at);
    run_block(threads, order, random);
  }
}

}  // namespace emulation
