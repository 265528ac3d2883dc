// The trunk's CUDA kernels, unmodified, on the CPU: behind a plain C interface for raw memory, and
// behind torch's side of the operators.
#define EMULATED_OPERATORS lpips_fast_emulated_trunk
// clang-format off: first of all, what the kernels find instead of nvcc's.
#include "played_torch.h"
// clang-format on

#include <exception>
#include <string>

#include "../../csrc/cuda/bias_relu_cuda.cu"
#include "../../csrc/cuda/max_pool_cuda.cu"
#include "../../csrc/cuda/scale_images_cuda.cu"
#include "../../csrc/ops.cpp"
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

// sizes: N, H, W; strides: of N, C, H, W. flags: a word an image, or null.
int run_scale_images(const char* in, const char* out, const void* images, const int64_t* sizes,
                     const int64_t* strides, const void* shift, const void* scale, int unit_range,
                     void* result, void* flags, int order, int ends) {
  const ImageBatch batch{images,     sizes[0],   sizes[1],   sizes[2],
                         strides[0], strides[1], strides[2], strides[3]};
  return run(order, ends, [&](emulation::Stream* stream) {
    dispatch(in, [&](auto element) {
      using In = decltype(element);
      using A = accumulator_t<In>;
      dispatch(out, [&](auto scaled) {
        using Out = decltype(scaled);
        launch_scale_images<In>(batch, static_cast<const A*>(shift), static_cast<const A*>(scale),
                                unit_range != 0, static_cast<Out*>(result),
                                static_cast<uint32_t*>(flags), stream);
      });
    });
  });
}

// How pixels are read: 0 as planes, 1 as interleaved channels, 2 one by one.
int order_of_pixels(const char* in, const char* out, const void* images, const int64_t* sizes,
                    const int64_t* strides, const void* result) {
  const ImageBatch batch{images,     sizes[0],   sizes[1],   sizes[2],
                         strides[0], strides[1], strides[2], strides[3]};
  int order = -1;
  dispatch(in, [&](auto element) {
    dispatch(out, [&](auto scaled) {
      order = static_cast<int>(pixel_order<decltype(element), decltype(scaled)>(batch, result));
    });
  });
  return order;
}

// shape: C, H, W, out H, out W, kernel, stride.
int run_max_pool(const char* dtype, const void* x, void* y, int64_t images, const int64_t* shape,
                 int order, int ends) {
  const PoolShape pool{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
  return run(order, ends, [&](emulation::Stream* stream) {
    dispatch(dtype, [&](auto feature) {
      using T = decltype(feature);
      launch_max_pool(static_cast<const T*>(x), static_cast<T*>(y), images, pool, stream);
    });
  });
}

int run_max_pool_backward(const char* dtype, const void* grad_y, const void* x, const void* y,
                          void* grad_x, int64_t images, const int64_t* shape, int order, int ends) {
  const PoolShape pool{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
  return run(order, ends, [&](emulation::Stream* stream) {
    dispatch(dtype, [&](auto feature) {
      using T = decltype(feature);
      launch_max_pool_backward(static_cast<const T*>(grad_y), static_cast<const T*>(x),
                               static_cast<const T*>(y), static_cast<T*>(grad_x), images, pool,
                               stream);
    });
  });
}
}
