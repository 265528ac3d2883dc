// Whether a weight that was packed is still what it was, whoever wrote to it and however.
//
// torch counts writes that go through a tensor (`_version`), but not those through `.data`, a numpy
// view or another alias, which exponential moving averages and broadcasts use. So the memory itself
// is looked at: at every call a sample of elements, at least one of each output and input channel,
// and one further chunk, in rotation, by a hash of its bytes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace lpips_fast {

class WeightWatch {
 public:
  enum class Verdict : int { kSame = 0, kSampleChanged = 1, kChunkChanged = 2 };

  // address: of the first element. The elements of shape (out, in, rows, columns) lie at the given
  // strides, in elements, and fill the memory from there without a gap.
  WeightWatch(std::uintptr_t address, int64_t element_size, const std::vector<int64_t>& shape,
              const std::vector<int64_t>& strides)
      : element_size_(element_size) {
    if (element_size < 1 || element_size > 8 || shape.size() != 4 || strides.size() != 4)
      throw std::invalid_argument("a weight to watch has four dimensions of up to 8 bytes each");
    int64_t elements = 1;
    for (int64_t size : shape) elements *= size;
    bytes_ = elements * element_size;
    // A 256th of the weight a call, so that a small network does not pay for it; whole words.
    chunk_ = std::clamp<int64_t>(bytes_ / 256, kSmallestChunk, kLargestChunk) / 8 * 8;
    if (elements > 0) {
      const int64_t out = shape[0], in = shape[1], taps = shape[2] * shape[3];
      for (int64_t k = 0; k < std::max(out, in); ++k) {
        // A multiplicative sequence visits the positions of a filter without a pattern.
        const int64_t tap = int64_t((uint64_t(k) * 0x9E3779B97F4A7C15ull) >> 33) % taps;
        const int64_t row = tap / shape[3], column = tap % shape[3];
        offsets_.push_back(element_size * ((k % out) * strides[0] + (k % in) * strides[1] +
                                           row * strides[2] + column * strides[3]));
      }
    }
    const char* memory = reinterpret_cast<const char*>(address);
    samples_.resize(offsets_.size());
    for (size_t k = 0; k < offsets_.size(); ++k) samples_[k] = element(memory + offsets_[k]);
    for (int64_t first = 0; first < bytes_; first += chunk_) hashes_.push_back(hash(memory, first));
  }

  // Calls after which every byte has been looked at.
  int64_t rounds() const { return int64_t(hashes_.size()); }

  // Looks at the memory, which is now at `address`. Any number of threads may.
  Verdict look(std::uintptr_t address) {
    const char* memory = reinterpret_cast<const char*>(address);
    bool same = true;
    for (size_t k = 0; k < offsets_.size(); ++k) {
      same &= element(memory + offsets_[k]) == samples_[k];
    }
    if (!same) return Verdict::kSampleChanged;
    if (hashes_.empty()) return Verdict::kSame;
    const size_t turn = next_.fetch_add(1, std::memory_order_relaxed) % hashes_.size();
    return hash(memory, int64_t(turn) * chunk_) == hashes_[turn] ? Verdict::kSame
                                                                 : Verdict::kChunkChanged;
  }

 private:
  static constexpr int64_t kSmallestChunk = 1 << 12, kLargestChunk = 1 << 16;

  uint64_t element(const char* at) const {
    uint64_t bits = 0;
    std::memcpy(&bits, at, size_t(element_size_));
    return bits;
  }

  // Sums of words times odd numbers: a change of any one word changes the hash.
  uint64_t hash(const char* memory, int64_t first) const {
    const char* at = memory + first;
    const int64_t length = std::min(chunk_, bytes_ - first), words = length / 8;
    uint64_t sums[4] = {0, 0, 0, 0};
    uint64_t factor = 0x9E3779B97F4A7C15ull;
    int64_t k = 0;
    for (; k + 4 <= words; k += 4) {
      for (int lane = 0; lane < 4; ++lane) {
        uint64_t word;
        std::memcpy(&word, at + 8 * (k + lane), 8);
        sums[lane] += word * (factor + uint64_t(2 * lane));
      }
      factor += 8;
    }
    for (; 8 * k < length; ++k) {
      uint64_t word = 0;
      std::memcpy(&word, at + 8 * k, size_t(std::min<int64_t>(8, length - 8 * k)));
      sums[0] += word * factor;
      factor += 2;
    }
    return sums[0] ^ (sums[1] * 3) ^ (sums[2] * 5) ^ (sums[3] * 7);
  }

  int64_t element_size_, bytes_ = 0, chunk_ = 8;
  std::vector<int64_t> offsets_;
  std::vector<uint64_t> samples_, hashes_;
  std::atomic<size_t> next_{0};
};

}  // namespace lpips_fast
