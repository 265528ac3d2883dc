// The CUDA kernels of the distance, unmodified, on the CPU: behind a plain C interface with a
// launch plan for raw memory, and behind torch's side of the operators.
#define EMULATED_OPERATORS lpips_fast_emulated_distance
// clang-format off: first of all, what the kernels find instead of nvcc's.
#include "played_torch.h"
// clang-format on

#include <exception>
#include <string>

#include "../../csrc/cuda/device_status_cuda.cu"
#include "../../csrc/cuda/distance_cuda.cu"
#include "../../csrc/ops.cpp"
#include "guarded_memory.h"

using namespace lpips_fast;
using namespace lpips_fast::cuda;

namespace {

using emulation::guarded_map, emulation::guarded_unmap;

std::string error;

// Operations of the interface beyond those of a plan.
constexpr int kTapBackward = 3;

template <typename T>
int run(int operation, const std::vector<LayerWork>& works, double eps, int multiprocessors,
        int order, void* out) {
  emulation::Stream stream{static_cast<emulation::Order>(order)};
  const auto planned =
      operation == kTapBackward ? Operation::kBackward : static_cast<Operation>(operation);
  const Plan plan = plan_call(planned, works, sizeof(T), multiprocessors);
  const int64_t bytes = plan.workspace * static_cast<int64_t>(sizeof(accumulator_t<T>));
  char* workspace = guarded_map(bytes, false);
  if (operation == kTapBackward) {
    launch_backward<T, true>(plan, eps, workspace, &stream);
  } else if (planned == Operation::kBackward) {
    launch_backward<T>(plan, eps, workspace, &stream);
  } else {
    launch_distance<T>(plan, eps, workspace, out, &stream);
  }
  guarded_unmap(workspace, bytes, false);
  return stream.launches;
}

}  // namespace

extern "C" {

int64_t size_of_layer_work() { return sizeof(LayerWork); }

const char* last_error() { return error.c_str(); }

// Returns the number of launches, or -1 (see last_error).
int run_distance(const char* dtype, int operation, const LayerWork* works, int count, double eps,
                 int multiprocessors, int order, void* out) {
  try {
    const std::vector<LayerWork> layers(works, works + count);
    const std::string name = dtype;
    if (name == "float32") return run<float>(operation, layers, eps, multiprocessors, order, out);
    if (name == "float64") return run<double>(operation, layers, eps, multiprocessors, order, out);
    if (name == "float16") return run<__half>(operation, layers, eps, multiprocessors, order, out);
    if (name == "bfloat16")
      return run<__nv_bfloat16>(operation, layers, eps, multiprocessors, order, out);
    error = "unknown dtype " + name;
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return -1;
}

// How a layer would be launched, for tests of the plan itself: vectors, blocks, threads, lanes,
// team_warps, slabs, tiles, tile_positions, workspace.
int plan_of_layer(int element_size, int operation, const LayerWork* work, int multiprocessors,
                  int64_t* out) {
  try {
    const Plan plan =
        plan_call(static_cast<Operation>(operation), {*work}, element_size, multiprocessors);
    const Launch& launch = plan.launches[0];
    const LayerTask& task = launch.tasks.layers[0];
    const int64_t facts[] = {launch.vectors, launch.blocks,       launch.threads,
                             task.lanes,     task.team_warps,     task.slabs,
                             task.tiles,     task.tile_positions, plan.workspace};
    std::copy(std::begin(facts), std::end(facts), out);
    return 0;
  } catch (const std::exception& exception) {
    error = exception.what();
    return -1;
  }
}
}
