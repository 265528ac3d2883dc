// The CUDA kernels and their launch plan, unmodified, behind a plain C interface on the CPU.
// tests/kernels/test_cuda_emulation.py builds and calls it.
#include "cuda_emulation.h"

#include <exception>
#include <string>

#include "../../csrc/cuda/distance_kernels.cuh"
#include "guarded_memory.h"

using namespace lpips_fast;
using namespace lpips_fast::cuda;

namespace {

using emulation::guarded_map, emulation::guarded_unmap;

std::string error;

template <typename T>
int run(Operation operation, const std::vector<LayerWork>& works, double eps, int multiprocessors,
        int order, void* out) {
  emulation::Stream stream{static_cast<emulation::Order>(order)};
  const Plan plan = plan_call(operation, works, sizeof(T), multiprocessors);
  const int64_t bytes = plan.workspace * static_cast<int64_t>(sizeof(accumulator_t<T>));
  char* workspace = guarded_map(bytes, false);
  if (operation == Operation::kBackward) {
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
    const auto op = static_cast<Operation>(operation);
    const std::string name = dtype;
    if (name == "float32") return run<float>(op, layers, eps, multiprocessors, order, out);
    if (name == "float64") return run<double>(op, layers, eps, multiprocessors, order, out);
    if (name == "float16") return run<__half>(op, layers, eps, multiprocessors, order, out);
    if (name == "bfloat16") return run<__nv_bfloat16>(op, layers, eps, multiprocessors, order, out);
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
