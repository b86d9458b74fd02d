// The ops that touch each element once: activations, gates, norms of rows, the embedding. All are
// bound by memory; see the headers of ops/ for the equations. Every element or row is computed by
// itself, so neighbours change nothing.
#include <algorithm>

#include "cuda/each_four.cuh"
#include "cuda/eight.cuh"
#include "cuda/launch.cuh"
#include "cuda/packed.h"
#include "ops/activation.h"
#include "ops/embedding.h"
#include "ops/gate.h"
#include "ops/log_sigmoid.h"
#include "ops/rms_norm.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = kElementThreads;

struct RmsNormParams {
  Elements x, y, gate;
  const float* w;  // or null
  float* scales;   // [R] or null
  bool has_gate, gate_first;
  Activation activation;
  std::int64_t rows;
  int width, groups;
  float eps;
  bool aligned;
};

// kRowThreads threads a row, a row of up to 16 elements a thread in registers. All of its loads are
// under way before the first is used.
template <int kRowThreads>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const RmsNormParams p) {
  constexpr int kRows = kThreads / kRowThreads;
  constexpr int kWarps = kRowThreads / 32;
  constexpr int kKept = 4;
  __shared__ float sums[kThreads / 32];
  const int lane = threadIdx.x % kRowThreads;
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * kRows + threadIdx.x / kRowThreads;
  const bool real = row < p.rows;
  const std::int64_t base = row * p.width;
  const float* w = p.w == nullptr ? nullptr : p.w + row % p.groups * p.width;
  struct Bits {
    uint4 x, gate;
  };
  const auto count = [&](int i) { return p.aligned ? kVector : min(4, p.width - i); };
  const auto fetch = [&](Bits& bits, int i) {
    bits.x = p.x.fetch(base + i, count(i));
    if (p.has_gate) bits.gate = p.gate.fetch(base + i, count(i));
  };
  // What the norm is of, and what its result is multiplied by.
  const auto widen = [&](float(&x)[4], float(&act)[4], const Bits& bits) {
    p.x.widen(x, bits.x);
    if (!p.has_gate) return;
    p.gate.widen(act, bits.gate);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      act[e] = activate(p.activation, act[e]);
      if (p.gate_first) x[e] *= act[e];
    }
  };
  float sum = 0;
  const auto add = [&](const Bits& bits) {
    float x[4];
    float act[4];
    widen(x, act, bits);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum = fmaf(x[e], x[e], sum);
  };
  Bits kept[kKept];
  if (real) {
#pragma unroll
    for (int n = 0; n < kKept; ++n) {
      const int i = (n * kRowThreads + lane) * 4;
      if (i < p.width) fetch(kept[n], i);
    }
#pragma unroll
    for (int n = 0; n < kKept; ++n) {
      if ((n * kRowThreads + lane) * 4 < p.width) add(kept[n]);
    }
    for (int i = (kKept * kRowThreads + lane) * 4; i < p.width; i += kRowThreads * 4) {
      Bits bits;
      fetch(bits, i);
      add(bits);
    }
  }
  sum = warp_sum(sum);
  if constexpr (kWarps > 1) {
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int n = 0; n < kWarps; ++n) sum += sums[threadIdx.x / kRowThreads * kWarps + n];
  }
  if (!real) return;
  const float scale = 1 / sqrtf(sum / static_cast<float>(p.width) + p.eps);
  if (p.scales != nullptr && lane == 0) p.scales[row] = scale;
  const auto finish = [&](const Bits& bits, int i) {
    float x[4];
    float act[4];
    float factor[4] = {1, 1, 1, 1};
    widen(x, act, bits);
    if (w != nullptr) load_four(factor, w + i, count(i));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (p.scales != nullptr) factor[e] = invertible_weight(factor[e]);
      x[e] = x[e] * scale * factor[e];
      if (p.has_gate && !p.gate_first) x[e] *= act[e];
    }
    p.y.store(x, base + i, count(i));
  };
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int i = (n * kRowThreads + lane) * 4;
    if (i < p.width) finish(kept[n], i);
  }
  for (int i = (kKept * kRowThreads + lane) * 4; i < p.width; i += kRowThreads * 4) {
    Bits bits;
    fetch(bits, i);
    finish(bits, i);
  }
}

// act(x) in place; what is to be rounded to bfloat16 to about 20 bits. The switch is outside of the
// loop, lest each element wait for the exponential of the one before it.
template <bool kRough>
__device__ void gate_values(Activation activation, float (&x)[8]) {
  if (activation == Activation::kSilu) {
#pragma unroll
    for (float& e : x) e *= sigmoid<kRough>(e);
  } else {
#pragma unroll
    for (float& e : x) e = activate<kRough>(activation, e);
  }
}

// The usual norm: whole vectors, eight elements a thread, a gate of the dtype of x. A team of
// threads walks rows in strides and asks for the next before it has done with one.
template <typename X, typename Y, int kTeam, bool kGated>
__global__ void __launch_bounds__(kTeam > 32 ? kTeam : kThreads)
    rms_norm_rows_kernel(const RmsNormParams p) {
  constexpr int kTeams = kTeam > 32 ? 1 : kThreads / kTeam;
  constexpr int kWarps = kTeam / 32;
  const int own = static_cast<int>(threadIdx.x) % kTeam * 8;
  const bool has_own = own < p.width;
  const std::int64_t first =
      static_cast<std::int64_t>(blockIdx.x) * kTeams + static_cast<int>(threadIdx.x) / kTeam;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kTeams;
  const auto* x = static_cast<const X*>(p.x.data) + own;
  auto* y = static_cast<Y*>(p.y.data) + own;
  const auto* gate = static_cast<const X*>(p.gate.data) + own;
  wait_for_input();
  float w[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  const auto load_weights = [&](std::int64_t row) {
    if (p.w == nullptr || !has_own) return;
    Eight<float> loaded;
    loaded.load(p.w + row % p.groups * p.width + own);
    loaded.get(w);
#pragma unroll
    for (float& element : w) {
      if (p.scales != nullptr) element = invertible_weight(element);
    }
  };
  if (p.groups == 1) load_weights(0);
  Eight<X> next = {};
  Eight<X> next_gate = {};
  const auto load = [&](std::int64_t row) {
    if (!has_own || row >= p.rows) return;
    next.load(x + row * p.width);
    if constexpr (kGated) next_gate.load(gate + row * p.width);
  };
  load(first);
  int turn = 0;
  // As long for all threads of a block: they take part in its sums.
  for (std::int64_t row = first; row - first % kTeams < p.rows; row += stride, turn ^= 1) {
    float v[8];
    float act[8];
    next.get(v);
    if constexpr (kGated) next_gate.get(act);
    load(row + stride);
    if (p.groups > 1) load_weights(row);
    if constexpr (kGated) {
      gate_values<sizeof(Y) == 2>(p.activation, act);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (p.gate_first) v[e] *= act[e];
      }
    }
    float sum = 0;
#pragma unroll
    for (const float value : v) sum = fmaf(value, value, sum);
#pragma unroll
    for (int offset = kTeam < 32 ? kTeam / 2 : 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, offset);
    }
    if constexpr (kTeam > 32) {
      __shared__ float sums[2][kWarps];  // in turns, so that one barrier a row is enough
      if (threadIdx.x % 32 == 0) sums[turn][threadIdx.x / 32] = sum;
      __syncthreads();
      sum = 0;
#pragma unroll
      for (int n = 0; n < kWarps; ++n) sum += sums[turn][n];
    }
    if (!has_own || row >= p.rows) continue;
    const float scale = 1 / sqrtf(sum / static_cast<float>(p.width) + p.eps);
    if (p.scales != nullptr && own == 0) p.scales[row] = scale;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      v[e] = v[e] * scale * w[e];
      if constexpr (kGated) {
        if (!p.gate_first) v[e] *= act[e];
      }
    }
    Eight<Y>::store(y + row * p.width, v);
  }
}

template <typename X, typename Y, bool kGated>
void launch_rows(Context& ctx, const RmsNormParams& p) {
  const auto launch = [&](auto kernel, int team) {
    const int threads = team > 32 ? team : kThreads;
    const std::int64_t all = (p.rows + threads / team - 1) / (threads / team);
    const std::int64_t at_once = std::int64_t{2048} / threads * ctx.stream().multiprocessors();
    launch_dependent(ctx, "rms_norm", kernel, dim3(static_cast<unsigned>(std::min(all, at_once))),
                     static_cast<unsigned>(threads), 0, p);
  };
  if (p.width <= 64) {
    launch(rms_norm_rows_kernel<X, Y, 8, kGated>, 8);
  } else if (p.width <= 128) {
    launch(rms_norm_rows_kernel<X, Y, 16, kGated>, 16);
  } else if (p.width <= 512) {
    launch(rms_norm_rows_kernel<X, Y, 64, kGated>, 64);
  } else if (p.width <= 1536) {
    launch(rms_norm_rows_kernel<X, Y, 192, kGated>, 192);
  } else if (p.width <= 3072) {
    launch(rms_norm_rows_kernel<X, Y, 384, kGated>, 384);
  } else {
    launch(rms_norm_rows_kernel<X, Y, 512, kGated>, 512);
  }
}

template <bool kGated>
void launch_rows(Context& ctx, const RmsNormParams& p) {
  if (p.x.is_bf16) {
    p.y.is_bf16 ? launch_rows<bf16, bf16, kGated>(ctx, p)
                : launch_rows<bf16, float, kGated>(ctx, p);
  } else {
    p.y.is_bf16 ? launch_rows<float, bf16, kGated>(ctx, p)
                : launch_rows<float, float, kGated>(ctx, p);
  }
}

constexpr std::int64_t kWidestRow = 4096;  // of the largest team

// A warp a row.
__global__ void __launch_bounds__(kThreads)
    feature_map_kernel(Elements x, std::int64_t rows, int width, bool aligned,
                       Activation activation, FeatureNorm norm) {
  const int lane = threadIdx.x % 32;
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const std::int64_t base = row * width;
  const auto value = [&](float(&v)[4], int i) {
    x.load(v, base + i, aligned ? kVector : min(4, width - i));
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = activate(activation, v[e]);
  };
  float sum = 0;
  for (int i = lane * 4; i < width; i += 128) {
    float v[4];
    value(v, i);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (i + e < width) sum += norm == FeatureNorm::kL2 ? v[e] * v[e] : v[e];
    }
  }
  sum = warp_sum(sum);
  const float scale = norm == FeatureNorm::kNone ? 1
                      : norm == FeatureNorm::kL2 ? 1 / sqrtf(sum + 1e-6F)
                                                 : 1 / sum;
  for (int i = lane * 4; i < width; i += 128) {
    float v[4];
    value(v, i);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] *= scale;
    x.store(v, base + i, aligned ? kVector : min(4, width - i));
  }
}

}  // namespace

void activation(Context& ctx, const ActivationArgs& args) {
  const Elements x(args.x);
  const Activation kind = args.activation;
  each_four(ctx, "activation", args.x.shape.size(), x.aligned(),
            [=] __device__(std::int64_t i, int count) {
              float v[4];
              x.load(v, i, count);
#pragma unroll
              for (int e = 0; e < 4; ++e) v[e] = activate(kind, v[e]);
              x.store(v, i, count);
            });
}

void glu(Context& ctx, const GluArgs& args) {
  const Elements gate_up(args.gate_up);
  const Elements y(args.y);
  const Activation kind = args.activation;
  const std::int64_t width = args.y.shape[1];
  const bool aligned = gate_up.aligned() && y.aligned() && width % 4 == 0;
  if (!aligned) {
    // Rows that no vector divides: element by element.
    each_four(ctx, "glu", args.y.shape.size(), false, [=] __device__(std::int64_t i, int count) {
      for (int e = 0; e < count; ++e) {
        const std::int64_t row = (i + e) / width;
        float gate[4];
        float up[4];
        gate_up.load(gate, i + e + row * width, 1);
        gate_up.load(up, i + e + (row + 1) * width, 1);
        up[0] *= activate(kind, gate[0]);
        y.store(up, i + e, 1);
      }
    });
    return;
  }
  each_four(ctx, "glu", args.y.shape.size(), true, [=] __device__(std::int64_t i, int count) {
    const std::int64_t row = i / width;
    float gate[4];
    float up[4];
    gate_up.load(gate, i + row * width, count);
    gate_up.load(up, i + (row + 1) * width, count);
#pragma unroll
    for (int e = 0; e < 4; ++e) up[e] *= activate(kind, gate[e]);
    y.store(up, i, count);
  });
}

void forget_gate(Context& ctx, const ForgetGateArgs& args) {
  const Elements x(args.x);
  const Elements k(args.k);
  each_four(ctx, "forget_gate", args.x.shape.size(), x.aligned() && k.aligned(),
            [=] __device__(std::int64_t i, int count) {
              float f[4];
              float g[4];
              x.load(f, i, count);
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                g[e] = sigmoid(f[e]);
                f[e] = sigmoid(-f[e]);
              }
              x.store(g, i, count);
              k.store(f, i, count);
            });
}

void feature_map(Context& ctx, const FeatureMapArgs& args) {
  const int width = static_cast<int>(args.x.shape[2]);
  const std::int64_t rows = args.x.shape[0] * args.x.shape[1];
  if (rows == 0) return;
  const Elements x(args.x);
  feature_map_kernel<<<blocks_for(rows, kThreads / 32), kThreads, 0, stream_of(ctx)>>>(
      x, rows, width, x.aligned() && width % 4 == 0, args.activation, args.norm);
  check_launch("feature_map");
}

void gate(Context& ctx, const GateArgs& args) {
  const Elements gate(args.gate);
  const Elements x(args.x);
  const Activation kind = args.activation;
  each_four(ctx, "gate", args.x.shape.size(), x.aligned() && gate.aligned(),
            [=] __device__(std::int64_t i, int count) {
              float g[4];
              float v[4];
              gate.load(g, i, count);
              x.load(v, i, count);
#pragma unroll
              for (int e = 0; e < 4; ++e) v[e] *= activate(kind, g[e]);
              x.store(v, i, count);
            });
}

void log_sigmoid(Context& ctx, const LogSigmoidArgs& args) {
  const auto* x = static_cast<const float*>(args.x.data);
  const auto* bias = static_cast<const float*>(args.bias.data);
  float* y = args.y.f32();
  const std::int64_t heads = args.y.shape[1];
  each_four(ctx, "log_sigmoid", args.y.shape.size(), false,
            [=] __device__(std::int64_t i, int count) {
              for (int e = 0; e < count; ++e) {
                const float v =
                    (x == nullptr ? 0 : x[i + e]) + (bias == nullptr ? 0 : bias[(i + e) % heads]);
                y[i + e] = fminf(v, 0) - log1pf(expf(-fabsf(v)));
              }
            });
}

void rms_norm(Context& ctx, const RmsNormArgs& args) {
  const std::int64_t rows = args.x.shape[0];
  if (rows == 0) return;
  const int width = static_cast<int>(args.x.shape[1]);
  const bool has_gate = args.gate.data != nullptr;
  const bool has_weight = args.w.data != nullptr;
  RmsNormParams p{
      .x = Elements(args.x),
      .y = Elements(args.y),
      .gate = Elements(args.gate),
      .w = static_cast<const float*>(args.w.data),
      .scales = static_cast<float*>(args.scales.data),
      .has_gate = has_gate,
      .gate_first = has_gate && args.gate_first,
      .activation = args.gate_activation,
      .rows = rows,
      .width = width,
      .groups = has_weight ? static_cast<int>(
                                 std::max<std::int64_t>(1, args.w.shape.size() / args.x.shape[1]))
                           : 1,
      .eps = args.eps,
      .aligned = false,
  };
  p.aligned = width % 4 == 0 && p.x.aligned() && p.y.aligned() && p.gate.aligned() &&
              reinterpret_cast<std::uintptr_t>(p.w) % 16 == 0;
  const bool plain_gate = !has_gate || args.gate.dtype == args.x.dtype;
  if (p.aligned && plain_gate && width % 8 == 0 && width <= kWidestRow) {
    return has_gate ? launch_rows<true>(ctx, p) : launch_rows<false>(ctx, p);
  }
  const auto launch = [&](auto kernel, int row_threads) {
    kernel<<<blocks_for(rows, kThreads / row_threads), kThreads, 0, stream_of(ctx)>>>(p);
  };
  if (width <= 512) {
    launch(rms_norm_kernel<32>, 32);
  } else if (width <= 2048) {
    launch(rms_norm_kernel<128>, 128);
  } else {
    launch(rms_norm_kernel<kThreads>, kThreads);
  }
  check_launch("rms_norm");
}

void embedding(Context& ctx, const EmbeddingArgs& args) {
  if (is_packed(args.table.dtype)) return packed_embedding(ctx, args);
  const std::int32_t* ids = args.ids.data();
  const Elements table(args.table);
  float* y = args.y.f32();
  const std::int64_t width = args.y.shape[1];
  const bool aligned = width % 4 == 0 && table.aligned();
  each_four(ctx, "embedding", args.y.shape.size(), aligned,
            [=] __device__(std::int64_t i, int count) {
              if (count == kVector) {
                float v[4];
                table.load(v, ids[i / width] * width + i % width, kVector);
                store_four(y + i, v, kVector);
                return;
              }
              for (int e = 0; e < count; ++e) {
                float v[4];
                table.load(v, ids[(i + e) / width] * width + (i + e) % width, 1);
                y[i + e] = v[0];
              }
            });
}

}  // namespace deltafox::cuda
