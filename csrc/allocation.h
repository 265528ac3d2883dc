// Memory from torch's allocators. Where there is none left, the caller gets the error that
// torch.empty raises on the device, in class and text: torch.OutOfMemoryError on CUDA, which
// programs catch to take smaller batches.
#pragma once

#ifdef __linux__
#include <dlfcn.h>
#endif

#include <array>
#include <cstdint>
#include <new>
#include <optional>
#include <vector>

#include "checks.h"
#include "stable_abi.h"

namespace lpips_fast {

using torch::headeronly::MemoryFormat;

// The stable ABI turns every error into a code, and with it the class is lost. So what failed is
// asked for once more, of at::empty itself, whose error passes through as it is. That function is
// not of the stable ABI: it is looked up by its name (where there is none, the error is a
// RuntimeError), and its arguments are declared as torch 2.10 to 2.13 have them.
namespace at_empty {

struct Sizes {
  const int64_t* data;
  size_t size;
};

struct Device {
  int8_t type, index;
};

struct Result {
  void* tensor = nullptr;
  Result() = default;
  Result(const Result&) = delete;
  Result& operator=(const Result&) = delete;
  ~Result() {  // there was memory after all: given back
    if (tensor != nullptr)
      aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(new void*(tensor)));
  }
};

#ifdef __linux__
using Call = Result (*)(Sizes, std::optional<ScalarType>, std::optional<torch::headeronly::Layout>,
                        std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat>);

// A symbol of the library, weak or not, would be a promise to have it: it is asked for when needed.
inline Call find() {
  return reinterpret_cast<Call>(
      dlsym(RTLD_DEFAULT,
            "_ZN2at4_ops19empty_memory_format4callEN3c108ArrayRefINS2_6SymIntEEESt8optionalINS2_"
            "10ScalarTypeEES6_INS2_6LayoutEES6_INS2_6DeviceEES6_IbES6_INS2_12MemoryFormatEE"));
}
#endif

}  // namespace at_empty

// Uninitialised memory of a shape.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype,
                    const torch::stable::Device& device,
                    MemoryFormat order = MemoryFormat::Contiguous) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size())),
      from(std::optional(dtype)),
      from(std::optional<torch::headeronly::Layout>()),
      from(std::optional(device)),
      from(std::optional<bool>()),
      from(std::optional(order))};
  if (torch_call_dispatcher("aten::empty", "memory_format", stack.data(), TORCH_ABI_VERSION) ==
      TORCH_SUCCESS)
    return torch::stable::detail::to<Tensor>(stack[0]);
#ifdef __linux__
  if (const at_empty::Call call = at_empty::find())
    call({shape.data(), shape.size()}, dtype, std::nullopt,
         at_empty::Device{static_cast<int8_t>(device.type()), static_cast<int8_t>(device.index())},
         std::nullopt, order);
#endif
  refuse("out of memory: torch's allocator has none left for ", shape_text(shape), " ",
         torch::headeronly::toString(dtype));
}

inline torch::stable::Device cpu() {
  return torch::stable::Device(torch::headeronly::DeviceType::CPU);
}

// Numbers between two steps of a kernel. std::vector alone would raise std::bad_alloc.
template <typename T>
std::vector<T> zeros(int64_t count) {
  try {
    return std::vector<T>(static_cast<size_t>(count));
  } catch (const std::exception&) {
    empty({product({count, static_cast<int64_t>(sizeof(T))})}, ScalarType::Byte, cpu());
    throw;
  }
}

// Whether the elements lie one beside the other in this order. The stride of a dimension of size 1
// does not matter, as in torch.
inline bool is_dense(const Tensor& t, MemoryFormat order) {
  if (order == MemoryFormat::Contiguous) return t.is_contiguous();
  if (t.dim() != 4) return false;
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t stride = 1;
  for (const size_t d : {1, 3, 2, 0}) {
    if (sizes[d] != 1 && strides[d] != stride) return false;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return true;
}

// `t` itself where it is dense in this order, and of this dtype if one is named, else such a copy.
inline Tensor dense(const Tensor& t, MemoryFormat order = MemoryFormat::Contiguous,
                    std::optional<ScalarType> dtype = std::nullopt) {
  const ScalarType wanted = dtype.value_or(t.scalar_type());
  if (is_dense(t, order) && t.scalar_type() == wanted) return t;
  const auto sizes = t.sizes();
  Tensor copy = empty({sizes.begin(), sizes.end()}, wanted, t.device(), order);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace lpips_fast
