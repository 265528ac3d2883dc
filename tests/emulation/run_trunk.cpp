// The trunk's CUDA kernels, unmodified, behind a plain C interface on the CPU.
// tests/test_cuda_trunk_emulation.py builds and calls it.
#include "cuda_emulation.h"

#define LPIPS_FAST_LAUNCH(kernel, blocks, threads, stream, tasks) \
  (stream)->launch(blocks, threads, [=] { (kernel)(tasks); })

#include <exception>
#include <string>

#include "../../csrc/cuda/bias_relu_kernels.cuh"
#include "guarded_memory.h"

using namespace lpips_fast;
using namespace lpips_fast::cuda;

namespace {

std::string error;

// Calls body(T{}) for the dtype of that name.
template <typename Body>
void dispatch(const std::string& name, const Body& body) {
  if (name == "float32") return body(float{});
  if (name == "float64") return body(double{});
  if (name == "float16") return body(__half{});
  if (name == "bfloat16") return body(__nv_bfloat16{});
  throw std::invalid_argument("unknown dtype " + name);
}

// Returns the number of launches, or -1 (see last_error).
template <typename Body>
int run(int order, int ends, const Body& body) {
  emulation::Stream stream{static_cast<emulation::Order>(order)};
  stream.ends = static_cast<unsigned>(ends);
  try {
    body(&stream);
    return stream.launches;
  } catch (const std::exception& exception) {
    error = exception.what();
    return -1;
  }
}

}  // namespace

extern "C" {

const char* last_error() { return error.c_str(); }

int run_bias_relu(const char* dtype, void* y, const void* bias, int64_t positions, int64_t channels,
                  int order, int ends) {
  return run(order, ends, [&](emulation::Stream* stream) {
    dispatch(dtype, [&](auto feature) {
      using T = decltype(feature);
      launch_bias_relu(static_cast<T*>(y), static_cast<const T*>(bias), positions, channels,
                       stream);
    });
  });
}
}
