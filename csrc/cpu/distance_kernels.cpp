// The formulas of LPIPS's distance (Zhang et al. 2018, eq. 1) and its gradient, vectorised, for one
// run: neighbouring positions with a constant stride between them.
//
//   r = 1 / (|a| + eps)      a^ = a r      d = sum_c w_c (a^_c - b^_c)^2
//   t_c = 2 g w_c (a^_c - b^_c)            dL/da_c = t_c r - a^_c (sum_k t_k a^_k) / |a|
//
// Memory: a position's vectors (channels-last) or a tile of positions (channels-first) come from
// memory once, in the pass that computes the norms; the later passes find them in the L1 or L2
// cache. Nothing is saved between forward and backward but the features themselves.
//
// a^ and b^ are rounded before they are subtracted (this file is compiled with -ffp-contract=off
// and asks for a fused multiply-add only in sums): so identical inputs give exactly 0, and
// d(a, b) equals d(b, a) to the bit.
#include "distance_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "lanes.h"

namespace lpips_fast {
namespace {

// 2^-13 of relative error per 2048 summands in the worst case is too much for float32: long sums
// over channels are folded into their total after this many terms.
constexpr int64_t kChannelBlock = 32;

// A zero vector has the gradient t / eps: right, finite, and beyond float16's range. There, and
// only there, it is clamped; elsewhere an overflow stays visible (GradScaler looks for it).
template <typename feature_t>
constexpr bool kClampsZeroVectors = std::is_same_v<feature_t, c10::Half>;

template <typename feature_t>
inline accumulator_t<feature_t> gradient_limit(accumulator_t<feature_t> norm) {
  using acc_t = accumulator_t<feature_t>;
  return norm == acc_t(0) ? acc_t(std::numeric_limits<feature_t>::max())
                          : std::numeric_limits<acc_t>::infinity();
}

// ---------------------------------------------------------------------------------------------
// channels-last: one position at a time, vectors along channels
// ---------------------------------------------------------------------------------------------

template <typename feature_t>
struct ChannelsLast {
  using L = Lanes<feature_t>;
  using acc_t = typename L::acc_t;
  using Step = typename L::Step;

  static acc_t sum(const Step& step) {
    auto total = step[0];
    for (int v = 1; v < L::kVecs; ++v) total = total + step[v];
    return sum_of_lanes(total);
  }

  static void norms(const feature_t* a, const feature_t* b, int64_t channels, acc_t& norm_a,
                    acc_t& norm_b) {
    Step sum_a = L::fill(0), sum_b = L::fill(0);
    for (int64_t c = 0; c < channels; c += L::kStep) {
      const int64_t count = std::min(L::kStep, channels - c);
      const Step x = L::load(a + c, count), y = L::load(b + c, count);
      for (int v = 0; v < L::kVecs; ++v) {
        sum_a[v] = at::vec::fmadd(x[v], x[v], sum_a[v]);
        sum_b[v] = at::vec::fmadd(y[v], y[v], sum_b[v]);
      }
    }
    norm_a = std::sqrt(sum(sum_a));
    norm_b = std::sqrt(sum(sum_b));
  }

  static void forward(const ForwardRun<feature_t>& run, int64_t channels, int64_t positions,
                      acc_t eps) {
    for (int64_t p = 0; p < positions; ++p) {
      const feature_t* a = run.a.data + p * run.a.position_stride;
      const feature_t* b = run.b.data + p * run.b.position_stride;
      acc_t norm_a, norm_b;
      norms(a, b, channels, norm_a, norm_b);
      const typename L::Vec r_a(acc_t(1) / (norm_a + eps)), r_b(acc_t(1) / (norm_b + eps));
      Step d = L::fill(0);
      for (int64_t c = 0; c < channels; c += L::kStep) {
        const int64_t count = std::min(L::kStep, channels - c);
        const Step x = L::load(a + c, count), y = L::load(b + c, count);
        const Step w = L::load_acc(run.weight + c, count);
        for (int v = 0; v < L::kVecs; ++v) {
          const auto difference = x[v] * r_a - y[v] * r_b;
          d[v] = at::vec::fmadd(w[v] * difference, difference, d[v]);
        }
      }
      run.distance[p] = sum(d);
    }
  }

  static void backward(const BackwardRun<feature_t>& run, int64_t channels, int64_t positions,
                       acc_t eps) {
    for (int64_t p = 0; p < positions; ++p) {
      const feature_t* a = run.a.data + p * run.a.position_stride;
      const feature_t* b = run.b.data + p * run.b.position_stride;
      acc_t norm_a, norm_b;
      norms(a, b, channels, norm_a, norm_b);
      const typename L::Vec r_a(acc_t(1) / (norm_a + eps)), r_b(acc_t(1) / (norm_b + eps));
      const typename L::Vec g(run.grad[p]), two_g(acc_t(2) * run.grad[p]);

      Step dot_a = L::fill(0), dot_b = L::fill(0);
      for (int64_t c = 0; c < channels; c += L::kStep) {
        const int64_t count = std::min(L::kStep, channels - c);
        const Step x = L::load(a + c, count), y = L::load(b + c, count);
        const Step w = L::load_acc(run.weight + c, count);
        Step weight_term;
        for (int v = 0; v < L::kVecs; ++v) {
          const auto unit_a = x[v] * r_a, unit_b = y[v] * r_b;
          const auto difference = unit_a - unit_b;
          const auto t = two_g * w[v] * difference;
          dot_a[v] = at::vec::fmadd(t, unit_a, dot_a[v]);
          dot_b[v] = at::vec::fmadd(t, unit_b, dot_b[v]);
          weight_term[v] = g * difference * difference;
        }
        if (run.grad_weight) {
          Step total = L::load_acc(run.grad_weight + c, count);
          for (int v = 0; v < L::kVecs; ++v) total[v] = total[v] + weight_term[v];
          L::store_acc(run.grad_weight + c, total, count);
        }
      }
      if (!run.grad_a.data && !run.grad_b.data) continue;

      const typename L::Vec k_a(norm_a > 0 ? sum(dot_a) / norm_a : acc_t(0));
      const typename L::Vec k_b(norm_b > 0 ? sum(dot_b) / norm_b : acc_t(0));
      for (int64_t c = 0; c < channels; c += L::kStep) {
        const int64_t count = std::min(L::kStep, channels - c);
        const Step x = L::load(a + c, count), y = L::load(b + c, count);
        const Step w = L::load_acc(run.weight + c, count);
        Step out_a, out_b;
        for (int v = 0; v < L::kVecs; ++v) {
          const auto unit_a = x[v] * r_a, unit_b = y[v] * r_b;
          const auto t = two_g * w[v] * (unit_a - unit_b);
          out_a[v] = t * r_a - unit_a * k_a;
          out_b[v] = unit_b * k_b - t * r_b;
        }
        if (run.deeper.data) {
          const Step more = L::load(run.deeper.data + p * run.deeper.position_stride + c, count);
          for (int v = 0; v < L::kVecs; ++v) out_a[v] = out_a[v] + more[v];
        }
        if (run.through_relu) {
          const typename L::Vec zero(acc_t(0));
          for (int v = 0; v < L::kVecs; ++v)
            out_a[v] = L::Vec::blendv(out_a[v], zero, x[v] <= zero);
        }
        if (run.grad_a.data)
          store_gradient(run.grad_a.data + p * run.grad_a.position_stride + c, out_a, norm_a,
                         count);
        if (run.grad_b.data)
          store_gradient(run.grad_b.data + p * run.grad_b.position_stride + c, out_b, norm_b,
                         count);
      }
    }
  }

  static void store_gradient(feature_t* to, Step& step, acc_t norm, int64_t count) {
    if constexpr (kClampsZeroVectors<feature_t>) {
      const acc_t limit = gradient_limit<feature_t>(norm);
      for (auto& v : step) v = at::vec::clamp(v, typename L::Vec(-limit), typename L::Vec(limit));
    }
    L::store(to, step, count);
  }
};

// ---------------------------------------------------------------------------------------------
// channels-first: a tile of neighbouring positions at a time, vectors along positions
// ---------------------------------------------------------------------------------------------

template <typename feature_t>
struct ChannelsFirst {
  using L = Lanes<feature_t>;
  using acc_t = typename L::acc_t;
  using Vec = typename L::Vec;
  using Step = typename L::Step;

  // Two cache lines of every channel: as much as the accumulators' registers allow, and a
  // 512-channel tile of both features still fits the L2 cache.
  static constexpr int kSteps = std::max<int>(1, static_cast<int>(32 / (L::kVecs * Vec::size())));
  static constexpr int64_t kTile = kSteps * L::kStep;
  using Tile = std::array<Step, kSteps>;

  static Tile fill(acc_t value) {
    Tile tile;
    tile.fill(L::fill(value));
    return tile;
  }

  // op(step, vector) over a tile.
  template <typename Op>
  static void each(const Op& op) {
    for (int s = 0; s < kSteps; ++s)
      for (int v = 0; v < L::kVecs; ++v) op(s, v);
  }

  static Tile load(const feature_t* from, int64_t count) {
    Tile tile;
    for (int s = 0; s < kSteps; ++s) {
      const int64_t left = std::clamp<int64_t>(count - s * L::kStep, 0, L::kStep);
      tile[s] = left > 0 ? L::load(from + s * L::kStep, left) : L::fill(0);
    }
    return tile;
  }

  static void store(feature_t* to, const Tile& tile, int64_t count) {
    for (int s = 0; s < kSteps; ++s) {
      const int64_t left = std::min(L::kStep, count - s * L::kStep);
      if (left > 0) L::store(to + s * L::kStep, tile[s], left);
    }
  }

  static void norms(const Run<const feature_t*>& run_a, const Run<const feature_t*>& run_b,
                    int64_t first, int64_t channels, int64_t count, Tile& norm_a, Tile& norm_b) {
    norm_a = fill(0);
    norm_b = fill(0);
    for (int64_t block = 0; block < channels; block += kChannelBlock) {
      Tile sum_a = fill(0), sum_b = fill(0);
      for (int64_t c = block; c < std::min(block + kChannelBlock, channels); ++c) {
        const Tile x = load(run_a.data + first + c * run_a.channel_stride, count);
        const Tile y = load(run_b.data + first + c * run_b.channel_stride, count);
        each([&](int s, int v) {
          sum_a[s][v] = at::vec::fmadd(x[s][v], x[s][v], sum_a[s][v]);
          sum_b[s][v] = at::vec::fmadd(y[s][v], y[s][v], sum_b[s][v]);
        });
      }
      each([&](int s, int v) {
        norm_a[s][v] = norm_a[s][v] + sum_a[s][v];
        norm_b[s][v] = norm_b[s][v] + sum_b[s][v];
      });
    }
    each([&](int s, int v) {
      norm_a[s][v] = norm_a[s][v].sqrt();
      norm_b[s][v] = norm_b[s][v].sqrt();
    });
  }

  static Tile reciprocal(const Tile& norm, acc_t eps) {
    Tile r;
    each([&](int s, int v) { r[s][v] = Vec(acc_t(1)) / (norm[s][v] + Vec(eps)); });
    return r;
  }

  static void forward(const ForwardRun<feature_t>& run, int64_t channels, int64_t positions,
                      acc_t eps) {
    for (int64_t first = 0; first < positions; first += kTile) {
      const int64_t count = std::min(kTile, positions - first);
      Tile norm_a, norm_b;
      norms(run.a, run.b, first, channels, count, norm_a, norm_b);
      const Tile r_a = reciprocal(norm_a, eps), r_b = reciprocal(norm_b, eps);
      Tile d = fill(0);
      for (int64_t block = 0; block < channels; block += kChannelBlock) {
        Tile sum = fill(0);
        for (int64_t c = block; c < std::min(block + kChannelBlock, channels); ++c) {
          const Tile x = load(run.a.data + first + c * run.a.channel_stride, count);
          const Tile y = load(run.b.data + first + c * run.b.channel_stride, count);
          const Vec w(run.weight[c]);
          each([&](int s, int v) {
            const auto difference = x[s][v] * r_a[s][v] - y[s][v] * r_b[s][v];
            sum[s][v] = at::vec::fmadd(w * difference, difference, sum[s][v]);
          });
        }
        each([&](int s, int v) { d[s][v] = d[s][v] + sum[s][v]; });
      }
      for (int s = 0; s < kSteps; ++s)
        L::store_acc(run.distance + first + s * L::kStep, d[s], count - s * L::kStep);
    }
  }

  static void backward(const BackwardRun<feature_t>& run, int64_t channels, int64_t positions,
                       acc_t eps) {
    for (int64_t first = 0; first < positions; first += kTile) {
      const int64_t count = std::min(kTile, positions - first);
      Tile norm_a, norm_b;
      norms(run.a, run.b, first, channels, count, norm_a, norm_b);
      const Tile r_a = reciprocal(norm_a, eps), r_b = reciprocal(norm_b, eps);
      Tile g;
      for (int s = 0; s < kSteps; ++s)
        g[s] = L::load_acc(run.grad + first + s * L::kStep, count - s * L::kStep);

      Tile dot_a = fill(0), dot_b = fill(0);
      for (int64_t c = 0; c < channels; ++c) {
        const Tile x = load(run.a.data + first + c * run.a.channel_stride, count);
        const Tile y = load(run.b.data + first + c * run.b.channel_stride, count);
        const Vec two_w(acc_t(2) * run.weight[c]);
        Vec weight_term(acc_t(0));
        each([&](int s, int v) {
          const auto unit_a = x[s][v] * r_a[s][v], unit_b = y[s][v] * r_b[s][v];
          const auto difference = unit_a - unit_b;
          const auto t = g[s][v] * two_w * difference;
          dot_a[s][v] = at::vec::fmadd(t, unit_a, dot_a[s][v]);
          dot_b[s][v] = at::vec::fmadd(t, unit_b, dot_b[s][v]);
          weight_term = weight_term + g[s][v] * difference * difference;
        });
        if (run.grad_weight) run.grad_weight[c] += sum_of_lanes(weight_term);
      }
      if (!run.grad_a.data && !run.grad_b.data) continue;

      Tile k_a, k_b;  // 0 where the norm is 0
      each([&](int s, int v) {
        const Vec zero(acc_t(0));
        k_a[s][v] = Vec::blendv(zero, dot_a[s][v] / norm_a[s][v], norm_a[s][v] > zero);
        k_b[s][v] = Vec::blendv(zero, dot_b[s][v] / norm_b[s][v], norm_b[s][v] > zero);
      });
      for (int64_t c = 0; c < channels; ++c) {
        const Tile x = load(run.a.data + first + c * run.a.channel_stride, count);
        const Tile y = load(run.b.data + first + c * run.b.channel_stride, count);
        const Vec two_w(acc_t(2) * run.weight[c]);
        Tile out_a, out_b;
        each([&](int s, int v) {
          const auto unit_a = x[s][v] * r_a[s][v], unit_b = y[s][v] * r_b[s][v];
          const auto t = g[s][v] * two_w * (unit_a - unit_b);
          out_a[s][v] = t * r_a[s][v] - unit_a * k_a[s][v];
          out_b[s][v] = unit_b * k_b[s][v] - t * r_b[s][v];
        });
        if (run.grad_a.data)
          store_gradient(run.grad_a.data + first + c * run.grad_a.channel_stride, out_a, norm_a,
                         count);
        if (run.grad_b.data)
          store_gradient(run.grad_b.data + first + c * run.grad_b.channel_stride, out_b, norm_b,
                         count);
      }
    }
  }

  static void store_gradient(feature_t* to, Tile& tile, const Tile& norm, int64_t count) {
    if constexpr (kClampsZeroVectors<feature_t>) {
      const Vec zero(acc_t(0));
      const Vec finite(static_cast<acc_t>(std::numeric_limits<feature_t>::max()));
      each([&](int s, int v) {
        tile[s][v] = Vec::blendv(tile[s][v], at::vec::clamp(tile[s][v], finite.neg(), finite),
                                 norm[s][v] == zero);
      });
    }
    store(to, tile, count);
  }
};

}  // namespace

template <typename feature_t>
void distance_run(const ForwardRun<feature_t>& run, MemoryOrder order, int64_t channels,
                  int64_t positions, double eps) {
  const auto kernel = order == MemoryOrder::kChannelsLast ? ChannelsLast<feature_t>::forward
                                                          : ChannelsFirst<feature_t>::forward;
  kernel(run, channels, positions, static_cast<accumulator_t<feature_t>>(eps));
}

template <typename feature_t>
void distance_backward_run(const BackwardRun<feature_t>& run, MemoryOrder order, int64_t channels,
                           int64_t positions, double eps) {
  const auto kernel = order == MemoryOrder::kChannelsLast ? ChannelsLast<feature_t>::backward
                                                          : ChannelsFirst<feature_t>::backward;
  kernel(run, channels, positions, static_cast<accumulator_t<feature_t>>(eps));
}

#define INSTANTIATE(feature_t)                                                               \
  template void distance_run<feature_t>(const ForwardRun<feature_t>&, MemoryOrder, int64_t,  \
                                        int64_t, double);                                    \
  template void distance_backward_run<feature_t>(const BackwardRun<feature_t>&, MemoryOrder, \
                                                 int64_t, int64_t, double);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::Half)
INSTANTIATE(c10::BFloat16)
#undef INSTANTIATE

}  // namespace lpips_fast
