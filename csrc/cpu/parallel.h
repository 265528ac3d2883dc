// Work on all of torch's threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

#include "../stable_abi.h"

namespace lpips_fast {

// Calls body(first, last) for parts of begin to end. An exception in any of them is thrown here as
// it is; torch's own parallel_for makes it another through the stable ABI.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  std::atomic_flag is_taken = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (...) {
      if (!is_taken.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace lpips_fast
