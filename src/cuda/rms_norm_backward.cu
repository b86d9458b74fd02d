// Backward of rms_norm (ops/rms_norm.h): one pass over the rows, bound by memory. Teams of threads
// walk rows in strides; each has its own sums of dw, which are put together at the end, in an order
// that depends on the shape alone.
#include "cuda/column_sums.cuh"
#include "cuda/rows.cuh"
#include "ops/rms_norm.h"

namespace deltafox::cuda {
namespace {

struct Params {
  Elements x, gate, dy, dx, dgate, rounded;
  const float* w;   // or null
  float* partials;  // [teams, D], or null where no dw is wanted
  bool has_gate, gate_first, accumulate, has_rounded;
  Activation activation;
  std::int64_t rows;
  int width, groups, teams;
  float eps;
  bool aligned;
};

// Four elements of a row as they lie in memory.
struct Bits {
  uint4 x, gate, dy, dx;

  __device__ void fetch(const Params& p, std::int64_t at, int count) {
    x = p.x.fetch(at, count);
    dy = p.dy.fetch(at, count);
    if (p.has_gate) gate = p.gate.fetch(at, count);
    if (p.accumulate) dx = p.dx.fetch(at, count);
  }
};

// What a row's x is multiplied by before and after the norm, and the slope of the gate.
struct Four {
  float x[4], dy[4], w[4], before[4], after[4], slope[4];

  __device__ Four(const Params& p, const Bits& bits, int i, int group, int count) {
    p.x.widen(x, bits.x);
    p.dy.widen(dy, bits.dy);
    float gate[4] = {};
    if (p.has_gate) p.gate.widen(gate, bits.gate);
    if (p.w != nullptr) load_four(w, p.w + group * p.width + i, count);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (p.w == nullptr) w[e] = 1;
      const float act = p.has_gate ? activate(p.activation, gate[e]) : 1;
      before[e] = p.gate_first ? act : 1;
      after[e] = p.gate_first ? 1 : act;
      slope[e] = p.has_gate ? activation_slope(p.activation, gate[e]) : 0;
    }
  }
};

template <int kTeam>
constexpr int kBlock = kTeam > 32 ? kTeam : 256;

// kTeam threads a row; kKept vectors of a thread stay in registers.
template <int kTeam, int kKept>
__global__ void __launch_bounds__(kBlock<kTeam>) rms_norm_backward_kernel(const Params p) {
  __shared__ float2 shared[2][kTeam / 32];  // in turns, so that one barrier a row is enough
  const int lane = static_cast<int>(threadIdx.x) % kTeam;
  const int team = static_cast<int>(blockIdx.x) * (kBlock<kTeam> / kTeam) +
                   static_cast<int>(threadIdx.x) / kTeam;
  const int group = team % p.groups;  // of all rows of the team
  const auto count = [&](int i) { return p.aligned ? kVector : min(4, p.width - i); };
  float dw[kKept][4] = {};
  int turn = 0;
  for (std::int64_t row = team; row < p.rows; row += p.teams, turn ^= 1) {
    const std::int64_t base = row * p.width;
    Bits kept[kKept];
#pragma unroll
    for (int n = 0; n < kKept; ++n) {
      const int i = (n * kTeam + lane) * 4;
      if (i < p.width) kept[n].fetch(p, base + i, count(i));
    }
    float2 sums = make_float2(0, 0);  // of squares, and of dz · z
    const auto add = [&](const Bits& bits, int i) {
      const Four four(p, bits, i, group, count(i));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float z = four.x[e] * four.before[e];
        sums.x = fmaf(z, z, sums.x);
        sums.y = fmaf(four.dy[e] * four.w[e] * four.after[e], z, sums.y);
      }
    };
#pragma unroll
    for (int n = 0; n < kKept; ++n) {
      const int i = (n * kTeam + lane) * 4;
      if (i < p.width) add(kept[n], i);
    }
    const auto each_more = [&](const auto& f) {
      for (int i = (kKept * kTeam + lane) * 4; i < p.width; i += kTeam * 4) {
        Bits bits;
        bits.fetch(p, base + i, count(i));
        f(bits, i);
      }
    };
    each_more(add);
    sums = make_float2(warp_sum(sums.x), warp_sum(sums.y));
    if constexpr (kTeam > 32) {
      if (lane % 32 == 0) shared[turn][lane / 32] = sums;
      __syncthreads();
      sums = make_float2(0, 0);
#pragma unroll
      for (int w = 0; w < kTeam / 32; ++w) {
        sums.x += shared[turn][w].x;
        sums.y += shared[turn][w].y;
      }
    }
    const float scale = 1 / sqrtf(sums.x / static_cast<float>(p.width) + p.eps);
    const float share = scale * scale * sums.y / static_cast<float>(p.width);
    // f(e, sum): what element e adds to dw.
    const auto finish = [&](const Bits& bits, int i, const auto& add_dw) {
      const Four four(p, bits, i, group, count(i));
      float dx[4] = {};
      float dgate[4];
      if (p.accumulate) p.dx.widen(dx, bits.dx);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float z = four.x[e] * four.before[e];
        const float dz = scale * (four.dy[e] * four.w[e] * four.after[e] - z * share);
        add_dw(e, four.dy[e] * four.after[e] * z * scale);
        dgate[e] =
            four.slope[e] * (p.gate_first ? dz * four.x[e] : four.dy[e] * four.w[e] * z * scale);
        dx[e] += dz * four.before[e];
      }
      p.dx.store(dx, base + i, count(i));
      if (p.has_rounded) p.rounded.store(dx, base + i, count(i));
      if (p.has_gate) p.dgate.store(dgate, base + i, count(i));
    };
#pragma unroll
    for (int n = 0; n < kKept; ++n) {
      const int i = (n * kTeam + lane) * 4;
      if (i < p.width) finish(kept[n], i, [&](int e, float sum) { dw[n][e] += sum; });
    }
    // Longer rows have their sums in memory.
    each_more([&](const Bits& bits, int i) {
      finish(bits, i, [&](int e, float sum) {
        if (p.partials == nullptr || i + e >= p.width) return;
        float& to = p.partials[static_cast<std::int64_t>(team) * p.width + i + e];
        to = row == team ? sum : to + sum;
      });
    });
  }
  if (p.partials == nullptr) return;
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int i = (n * kTeam + lane) * 4;
    if (i >= p.width) continue;
    store_four(p.partials + static_cast<std::int64_t>(team) * p.width + i, dw[n], count(i));
  }
}

template <int kTeam, int kKept>
void launch(Context& ctx, Params p, int max_blocks, float* dw) {
  constexpr int kTeams = kBlock<kTeam> / kTeam;
  // As many blocks on every GPU, so that sums have one order. No more teams than rows: each has
  // one. Teams are whole sets of groups.
  const std::int64_t most = std::min<std::int64_t>(max_blocks, p.rows / kTeams);
  const std::int64_t blocks = std::max<std::int64_t>(1, most / p.groups) * p.groups;
  p.teams = static_cast<int>(blocks) * kTeams;
  ScratchScope scratch(ctx);
  if (dw != nullptr) p.partials = scratch.tensor({p.teams, p.width}).f32();
  rms_norm_backward_kernel<kTeam, kKept>
      <<<static_cast<unsigned>(blocks), kBlock<kTeam>, 0, stream_of(ctx)>>>(p);
  check_launch("rms_norm_backward");
  if (dw == nullptr) return;
  const int sums = p.groups * p.width;
  add_column_sums(ctx, "rms_norm_backward", p.teams / p.groups, sums, dw,
                  MatrixElements{p.partials, sums});
}

}  // namespace

void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args) {
  if (args.x.shape.size() == 0) return;
  const bool has_gate = args.gate.data != nullptr;
  const std::int64_t width = args.x.shape[1];
  const std::int64_t groups = args.w.data == nullptr ? 1 : args.w.shape.size() / width;
  Params p{
      .x = Elements(args.x),
      .gate = Elements(args.gate),
      .dy = Elements(args.dy),
      .dx = Elements(args.dx),
      .dgate = Elements(args.dgate),
      .rounded = Elements(args.rounded),
      .w = static_cast<const float*>(args.w.data),
      .partials = nullptr,
      .has_gate = has_gate,
      .gate_first = has_gate && args.gate_first,
      .accumulate = args.accumulate_dx,
      .has_rounded = args.rounded.data != nullptr,
      .activation = args.gate_activation,
      .rows = args.x.shape[0],
      .width = static_cast<int>(width),
      .groups = static_cast<int>(std::max<std::int64_t>(1, groups)),
      .teams = 0,
      .eps = args.eps,
      .aligned = false,
  };
  p.aligned = width % 4 == 0 && p.x.aligned() && p.gate.aligned() && p.dy.aligned() &&
              p.dx.aligned() && p.dgate.aligned() && p.rounded.aligned() &&
              reinterpret_cast<std::uintptr_t>(p.w) % 16 == 0;
  auto* dw = static_cast<float*>(args.dw.data);
  if (width <= 128) {
    launch<32, 1>(ctx, p, 528, dw);
  } else if (width <= 1536) {
    launch<128, 3>(ctx, p, 1056, dw);
  } else {
    launch<512, 4>(ctx, p, 264, dw);
  }
}

}  // namespace deltafox::cuda
