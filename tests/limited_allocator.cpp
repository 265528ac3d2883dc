// Torch's CPU allocator with a limit: beyond it, memory runs out as it does on CUDA, with
// c10::OutOfMemoryError. tests/test_out_of_memory.py builds it and calls it by ctypes.
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

class LimitedAllocator final : public c10::Allocator {
 public:
  c10::Allocator* torchs = nullptr;
  std::atomic<int64_t> limit = kNone, largest = 0;

  c10::DataPtr allocate(size_t bytes) override {
    const auto asked = static_cast<int64_t>(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, asked <= limit, "played out of memory: tried to allocate ",
                     bytes, " bytes");
    int64_t before = largest;
    while (before < asked && !largest.compare_exchange_weak(before, asked)) {
    }
    return torchs->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return torchs->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    torchs->copy_data(to, from, bytes);
  }
};

LimitedAllocator allocator;

}  // namespace

extern "C" {

void install() {
  allocator.torchs = c10::GetAllocator(c10::DeviceType::CPU);
  c10::SetAllocator(c10::DeviceType::CPU, &allocator, 255);
}

// No tensor of more bytes; -1: any.
void set_limit(int64_t bytes) {
  allocator.limit = bytes < 0 ? kNone : bytes;
  allocator.largest = 0;
}

// Of the tensors since the limit was set.
int64_t largest() { return allocator.largest; }

}  // extern "C"
