// Large pages for large results. Fresh memory is mapped page by page as it is first written, which
// for 4 KiB pages takes several times as long as the writing; where the system leaves 2 MiB pages
// to the program's choice, this is the choice.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "../stable_abi.h"

namespace lpips_fast {

// `t` itself, whose memory has not been written to yet.
inline torch::stable::Tensor on_large_pages(const torch::stable::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 * 1024 * 1024;
  const auto bytes = static_cast<uintptr_t>(t.numel()) * t.element_size();
  if (bytes >= 2 * kPage) {
    const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t last = (begin + bytes) / kPage * kPage;
    // Advice only: whatever becomes of it, the memory is the same.
    if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return t;
}

}  // namespace lpips_fast
