// Memory whose neighbours may not be touched, watched for races, and its C interface for the tests.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "race_detector.h"

namespace emulation {

inline int64_t page() { return sysconf(_SC_PAGESIZE); }
inline int64_t whole_pages(int64_t bytes) { return (bytes + page() - 1) / page() * page(); }

// Between two pages that may not be touched, so that a step outside ends the program: flush with
// the one behind it, or with `in_front` the one before it.
inline char* guarded_map(int64_t bytes, bool in_front) {
  const int64_t inner = whole_pages(std::max<int64_t>(bytes, 1));
  char* base = static_cast<char*>(mmap(nullptr, inner + 2 * page(), PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base == MAP_FAILED) throw std::bad_alloc();
  mprotect(base, page(), PROT_NONE);
  mprotect(base + page() + inner, page(), PROT_NONE);
  char* data = base + page() + (in_front ? 0 : inner - bytes);
  std::memset(data, 0xff, bytes);  // NaN in every dtype
  races::watch(data, bytes);
  return data;
}

inline void guarded_unmap(char* data, int64_t bytes, bool in_front) {
  const int64_t inner = whole_pages(std::max<int64_t>(bytes, 1));
  races::unwatch(data, bytes);
  munmap(data - page() - (in_front ? 0 : inner - bytes), inner + 2 * page());
}

}  // namespace emulation

// Not inline, so that a library that includes this exports them.
extern "C" {

void* guarded_allocate(int64_t bytes, int in_front) {
  return emulation::guarded_map(bytes, in_front != 0);
}

void guarded_free(void* data, int64_t bytes, int in_front) {
  emulation::guarded_unmap(static_cast<char*>(data), bytes, in_front != 0);
}
}
