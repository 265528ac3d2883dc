// What every operator asks of its arguments before a pointer is taken, whoever calls it: a kernel
// trusts whatever passed. A refusal is a RuntimeError of one sentence: what was given, what is
// expected. (STD_TORCH_CHECK would add the path of this file on the builder's machine.)
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "feature_dtype.h"
#include "sizes.h"
#include "stable_abi.h"

namespace lpips_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// A macro, lest the sentence's parts be computed where all is well.
#define LPIPS_FAST_CHECK(condition, ...) \
  do {                                   \
    if (!(condition)) [[unlikely]]       \
      lpips_fast::refuse(__VA_ARGS__);   \
  } while (false)

// "(2, 3)"
template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

inline std::string shape_of(const Tensor& t) { return shape_text(t.sizes()); }

// "(2, 3) Float"
inline std::string description_of(const Tensor& t) {
  return shape_of(t) + " " + torch::headeronly::toString(t.scalar_type());
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto sizes_a = a.sizes(), sizes_b = b.sizes();
  return std::equal(sizes_a.begin(), sizes_a.end(), sizes_b.begin(), sizes_b.end());
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  const auto sizes = t.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

// -------------------------------------------------------------------------------------- memory

// Where an operator runs. Tensors may come from elsewhere all the same: torch picks the kernel by
// one of them, and so a meta tensor, which has no memory, arrives among others.
enum class Backend { kCPU, kCUDA };

// Checks the memory of a call's tensors: on the kernel's device, dense or strided, all of it there,
// and of a size whose products, even of an empty tensor's other dimensions, can be computed.
class Operands {
 public:
  explicit Operands(Backend backend)
      : type_(backend == Backend::kCPU ? aoti_torch_device_type_cpu()
                                       : aoti_torch_device_type_cuda()),
        backend_(backend) {}

  Operands& check(const char* name, const Tensor& t) {
    int32_t type = 0, index = 0, layout = 0;
    get(aoti_torch_get_device_type(t.get(), &type));
    get(aoti_torch_get_device_index(t.get(), &index));
    get(aoti_torch_get_layout(t.get(), &layout));
    if (index_ == kNone) index_ = index;
    LPIPS_FAST_CHECK(type == type_ && (backend_ == Backend::kCPU || index == index_), name,
                     " and the others must be on one device, here ", backend_name(),
                     "; move it there with .to()");
    LPIPS_FAST_CHECK(layout == aoti_torch_layout_strided(), name,
                     " is sparse or in a layout of its own; call .to_dense() first");
    check_extent(name, t);
    return *this;
  }

  Operands& check(const char* name, const std::optional<Tensor>& t) {
    return t ? check(name, *t) : *this;
  }

  Operands& check(const char* name, const TensorList& tensors) {
    for (const Tensor& t : tensors) check(name, t);
    return *this;
  }

 private:
  static constexpr int32_t kNone = -2;

  static void get(AOTITorchError error) {
    LPIPS_FAST_CHECK(error == 0, "torch does not say where a tensor lies");
  }

  const char* backend_name() const {
    return backend_ == Backend::kCPU ? "the CPU" : "a CUDA device";
  }

  static void check_extent(const char* name, const Tensor& t) {
    const auto sizes = t.sizes(), strides = t.strides();
    int64_t extent = 1, last = t.storage_offset();
    bool is_empty = false;
    for (size_t d = 0; d < sizes.size(); ++d) {
      extent = product({extent, std::max<int64_t>(sizes[d], 1)});
      is_empty |= sizes[d] == 0;
      if (sizes[d] > 1) last = sum(last, product({sizes[d] - 1, strides[d]}));
    }
    LPIPS_FAST_CHECK(extent <= kTooLarge / 4, name, " is too large: ", shape_of(t));
    if (is_empty) return;
    int64_t bytes = 0;
    get(aoti_torch_get_storage_size(t.get(), &bytes));
    LPIPS_FAST_CHECK(product({sum(last, 1), static_cast<int64_t>(t.element_size())}) <= bytes, name,
                     " has a memory of ", bytes, " bytes, less than ", shape_of(t),
                     " takes: it was freed or resized");
  }

  int32_t type_, index_ = kNone;
  Backend backend_;
};

// -------------------------------------------------------------------------------- what is shared

inline void check_images(const char* name, const Tensor& t) {
  LPIPS_FAST_CHECK(t.dim() == 4 && is_feature_dtype(t.scalar_type()), name,
                   " takes (N, C, H, W) of float32, float64, float16 or bfloat16, got ",
                   description_of(t));
}

inline void check_parameter(const char* name, int64_t value, int64_t least) {
  LPIPS_FAST_CHECK(value >= least && value <= kMaxParameter, name, " must be at least ", least,
                   " and at most ", kMaxParameter, ", got ", value);
}

}  // namespace lpips_fast
