// Memory for a kernel that is exactly as large as it may touch: AddressSanitizer sees one byte
// more.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

namespace sanitize {

inline std::mt19937_64& generator() {
  static std::mt19937_64 numbers(20180611);
  return numbers;
}

inline int64_t integer(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator());
}

// `count` random numbers.
template <typename T>
class Exact {
 public:
  explicit Exact(int64_t count) : bytes_(new char[count * sizeof(T)]), count_(count) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count; ++i) data()[i] = static_cast<T>(normal(generator()));
  }
  T* data() { return reinterpret_cast<T*>(bytes_.get()); }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.get()); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }

 private:
  std::unique_ptr<char[]> bytes_;
  int64_t count_;
};

// A sanitizer sees memory alone: that the kernel did its work shows in its results.
inline void expect_close(double got, double expected, double tolerance, const char* what) {
  const double error = got < expected ? expected - got : got - expected;
  const double size = expected < 0 ? -expected : expected;
  if (!(error <= tolerance * (1 + size))) {
    std::fprintf(stderr, "%s: got %.9g, expected %.9g\n", what, got, expected);
    std::exit(1);
  }
}

}  // namespace sanitize
