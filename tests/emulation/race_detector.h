// Looks at every load and store of a kernel that runs in the emulation (fibers.h), as the
// compiler's hooks for its thread sanitizer report them; the sanitizer's own library is not linked.
//
// The rules are those of CUDA for threads without atomics or fences:
//
// - Accesses of two threads to one place, one of them a write, race unless a __syncthreads lies
//   between them. Threads of different blocks have no barrier. Shuffles order nothing.
// - What is read of shared memory has been written by the block before.
// - What goes through the read-only cache (__ldg) is written by nobody during the launch.
// - An access of n bytes lies at a multiple of n.
//
// It looks at the accesses that the inputs of a test bring about, in one order; since it compares
// barriers and not times, the order does not matter. It knows nothing of volatile accesses, fences
// and the memory model's weaker orders, which the kernels do not use.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation::races {

// Global memory that is watched. All of a library's .bss is shared memory: that is where
// `static` variables of kernels lie.
void watch(const void* begin, size_t bytes);
void unwatch(const void* begin, size_t bytes);

void start_launch(const void* kernel);
void start_block(unsigned block);
void pass_barrier();     // of the block that runs
void enter(int thread);  // from here to leave(), accesses are the kernel's
void leave();

enum class Access { kRead, kWrite, kAtomic, kReadOnlyCache };

void look(const void* address, size_t bytes, Access access, bool is_aligned_type);

}  // namespace emulation::races
