// The plans of CUDA launches (csrc/cuda/launch_plan.h, row_blocks.h), which are plain C++: random
// layers, among them absurdly large ones. A plan covers every position once, or says what does not
// fit; no arithmetic on the way may overflow.
#include <cstdlib>
#include <stdexcept>

#include "../../csrc/cuda/launch_plan.h"
#include "../../csrc/cuda/row_blocks.h"
#include "exact_memory.h"

using namespace lpips_fast;
using namespace lpips_fast::cuda;
using sanitize::integer;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "a plan %s\n", what);
  std::exit(1);
}

// Small numbers mostly, and now and then one up to 2^20.
int64_t size() { return integer(0, 9) ? integer(0, 70) : integer(0, int64_t{1} << 20); }

LayerWork random_layer(int64_t batch, int element_size) {
  static char memory[64];
  LayerView layer{};
  layer.n = batch;
  layer.c = size();
  layer.h = size();
  layer.w = size();
  layer.order = integer(0, 1) ? MemoryOrder::kChannelsLast : MemoryOrder::kChannelsFirst;
  const int64_t gap = integer(0, 2);
  const bool last = layer.order == MemoryOrder::kChannelsLast;
  const int64_t stride_w = last ? layer.c : 1, stride_h = layer.w * stride_w + gap;
  const int64_t stride_c = last ? 1 : layer.h * stride_h;
  const int64_t stride_n = last ? layer.h * stride_h : layer.c * stride_c;
  const char* data = memory + integer(0, 3) * element_size;
  layer.feat0 = {data, stride_n, stride_c, stride_h, stride_w};
  layer.feat1 = layer.feat0;
  layer.weight = memory;
  LayerWork work{layer};
  if (integer(0, 1)) work.grad0 = {memory, stride_n, stride_c, stride_h, stride_w};
  if (integer(0, 1)) work.grad_weight = memory;
  return work;
}

void plan() {
  const int element_size = 1 << integer(1, 3);
  const auto operation = static_cast<Operation>(integer(0, 2));
  std::vector<LayerWork> works;
  const int64_t batch = size();
  for (int64_t l = integer(1, 12); l > 0; --l) works.push_back(random_layer(batch, element_size));
  if (operation != Operation::kBackward)
    for (LayerWork& work : works) work.grad0.data = work.grad_weight = nullptr;
  Plan plan;
  try {
    plan = plan_call(operation, works, element_size, static_cast<int>(integer(1, 200)));
  } catch (const std::invalid_argument&) {
    return;
  }
  size_t layers = 0;
  for (const Launch& launch : plan.launches) {
    layers += static_cast<size_t>(launch.tasks.layer_count);
    expect(launch.threads > 0 && launch.threads <= 1024, "has too many threads a block");
    for (int32_t l = 0; l < launch.tasks.layer_count; ++l) {
      const LayerTask& task = launch.tasks.layers[l];
      expect(batch == 0 || int64_t{task.tiles} * task.tile_positions >= task.positions,
             "misses positions");
    }
  }
  expect(layers == works.size(), "misses a layer");
}

void rows() {
  const int64_t rows = size() * integer(0, 1 << 12), items = size() * integer(0, 1 << 12);
  try {
    const RowBlocks cut = cut_rows(rows, items);
    expect(rows == 0 || items == 0 || int64_t{cut.parts} * cut.threads >= items, "misses items");
    expect(cut.threads <= kRowThreads, "has too many threads a block");
  } catch (const std::invalid_argument&) {
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 10000;
  for (int round = 0; round < rounds; ++round) {
    plan();
    rows();
  }
  std::printf("%d rounds of launch plans\n", rounds);
  return 0;
}
