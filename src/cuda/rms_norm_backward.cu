// Backward of rms_norm (ops/rms_norm.h): one pass over the rows, bound by memory. Teams of threads
// walk rows in strides, eight elements a thread, and fetch the next row before they work on one;
// each has its own sums of dw, which are put together at the end, in an order that depends on the
// shape alone.
#include "cuda/column_sums.cuh"
#include "cuda/eight.cuh"
#include "cuda/rows.cuh"
#include "ops/rms_norm.h"

namespace deltafox::cuda {
namespace {

// What a kernel computes from.
enum class From { kInput, kInputAndGate, kOutput };

// X: of x and dx; Y: of dy, y, the gate and its gradient.
template <typename X, typename Y>
struct Params {
  const X* x;           // or null, and then
  const Y* y;           // and
  const float* scales;  // [R]
  const Y* dy;
  const Y* gate;   // or null
  const float* w;  // or null
  X* dx;
  Y* dgate;
  bf16* rounded;    // or null
  float* partials;  // [blocks, D], or null where no dw is wanted
  bool gate_first, accumulate;
  Activation activation;
  std::int64_t rows;
  int width, groups;
  float eps;
  bool aligned;

  __device__ int count(int i) const { return aligned ? kWholeEight : min(8, width - i); }
};

// Eight elements of a row as they lie in memory.
template <typename X, typename Y, From kFrom>
struct Bits {
  Eight<X> x, dx;
  Eight<Y> y, dy, gate;
  float scale;

  __device__ void fetch(const Params<X, Y>& p, std::int64_t row, int i) {
    const std::int64_t at = row * p.width + i;
    if constexpr (kFrom == From::kOutput) {
      load_eight(y, p.y + at, p.count(i));
      scale = p.scales[row];
    } else {
      load_eight(x, p.x + at, p.count(i));
    }
    load_eight(dy, p.dy + at, p.count(i));
    if (kFrom == From::kInputAndGate) load_eight(gate, p.gate + at, p.count(i));
    if (p.accumulate) load_eight(dx, p.dx + at, p.count(i));
  }
};

template <From kFrom, typename X, typename Y>
__device__ void load_weights(float (&w)[8], const Params<X, Y>& p, int group, int i) {
  Eight<float> bits;
  if (p.w != nullptr) load_eight(bits, p.w + group * p.width + i, p.count(i));
  bits.get(w);
#pragma unroll
  for (float& element : w) {
    if (kFrom == From::kOutput) element = invertible_weight(element);
    if (p.w == nullptr) element = 1;
  }
}

// z = x · before is what is normed, dy · after what comes back to z · scale · w. From the output
// z is normed already.
template <typename X, typename Y, From kFrom>
struct Values {
  float z[8], dy[8], before[8], slope[8];

  __device__ Values(const Params<X, Y>& p, const Bits<X, Y, kFrom>& bits, const float (&w)[8]) {
    constexpr bool kRough = sizeof(Y) == 2;
    bits.dy.get(dy);
    if constexpr (kFrom == From::kOutput) {
      bits.y.get(z);
#pragma unroll
      for (int e = 0; e < 8; ++e) z[e] = __fdividef(z[e], w[e]);
    } else {
      bits.x.get(z);
    }
    if (kFrom != From::kInputAndGate) return;
    float gate[8];
    bits.gate.get(gate);
    // With an activation that is known as it is compiled, elements are computed side by side.
    const auto each = [&](Activation activation) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float2 act = activate_with_slope<kRough>(activation, gate[e]);
        before[e] = p.gate_first ? act.x : 1;
        // What of the gate's gradient is known before the sums.
        slope[e] = act.y * (p.gate_first ? z[e] : z[e] * dy[e]);
        z[e] *= before[e];
        dy[e] *= p.gate_first ? 1 : act.x;
      }
    };
    p.activation == Activation::kSilu ? each(Activation::kSilu) : each(p.activation);
  }
};

template <int kTeam>
constexpr int kBlock = kTeam > 32 ? kTeam : 256;
constexpr int kLargestTeam = 384;

// The sums over a team, the same in all its threads.
template <int kTeam>
__device__ float2 team_sum(float2 sums, int turn) {
#pragma unroll
  for (int offset = kTeam < 32 ? kTeam / 2 : 16; offset > 0; offset /= 2) {
    sums.x += __shfl_xor_sync(0xffffffff, sums.x, offset);
    sums.y += __shfl_xor_sync(0xffffffff, sums.y, offset);
  }
  if constexpr (kTeam > 32) {
    __shared__ float2 shared[2][kTeam / 32];  // in turns, so that one barrier a row is enough
    if (threadIdx.x % 32 == 0) shared[turn][threadIdx.x / 32] = sums;
    __syncthreads();
    sums = make_float2(0, 0);
#pragma unroll
    for (const float2& part : shared[turn]) {
      sums.x += part.x;
      sums.y += part.y;
    }
  }
  return sums;
}

// Rows of a block's teams are of one group.
template <typename X, typename Y, From kFrom, int kTeam>
__global__ void __launch_bounds__(kBlock<kTeam>, kTeam == kLargestTeam          ? 1
                                                 : kFrom == From::kInputAndGate ? 2
                                                                                : 3)
    rms_norm_backward_kernel(const __grid_constant__ Params<X, Y> p) {
  constexpr int kTeams = kBlock<kTeam> / kTeam;
  const int lane = static_cast<int>(threadIdx.x) % kTeam;
  const int block = static_cast<int>(blockIdx.x) / p.groups;
  const int group = static_cast<int>(blockIdx.x) % p.groups;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kTeams;
  const std::int64_t first =
      (static_cast<std::int64_t>(block) * kTeams + threadIdx.x / kTeam) * p.groups + group;
  const int own = lane * 8;  // the first of the elements that stay in registers
  const bool has_own = own < p.width;
  float w[8] = {};
  if (has_own) load_weights<kFrom>(w, p, group, own);
  float dw[8] = {};
  float* partials = p.partials == nullptr
                        ? nullptr
                        : p.partials + static_cast<std::int64_t>(blockIdx.x) * p.width;

  Bits<X, Y, kFrom> next = {};
  if (has_own && first < p.rows) next.fetch(p, first, own);
  int turn = 0;
  // All teams of a warp take part in its sums, with rows or without.
  const std::int64_t begin = first - threadIdx.x / kTeam * p.groups;
  for (std::int64_t base = begin; base < p.rows; base += stride, turn ^= 1) {
    const std::int64_t row = base + (first - begin);
    const bool has_row = row < p.rows;
    const Bits<X, Y, kFrom> bits = next;
    if (has_own && row + stride < p.rows) next.fetch(p, row + stride, own);
    float2 sums = make_float2(0, 0);  // of squares, and of dz · z
    const auto add = [&](const Bits<X, Y, kFrom>& from, const float(&weights)[8]) {
      if constexpr (kFrom == From::kOutput) {
        float y[8];
        float dy[8];
        from.y.get(y);
        from.dy.get(dy);
#pragma unroll
        for (int e = 0; e < 8; ++e) sums.y = fmaf(dy[e], y[e], sums.y);
      } else {
        const Values<X, Y, kFrom> values(p, from, weights);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          sums.x = fmaf(values.z[e], values.z[e], sums.x);
          sums.y = fmaf(values.dy[e] * weights[e], values.z[e], sums.y);
        }
      }
    };
    // Of rows longer than a team's eights.
    const auto each_more = [&](const auto& f) {
      if constexpr (kTeam == kLargestTeam) {
        for (int i = own + kTeam * 8; i < p.width; i += kTeam * 8) {
          Bits<X, Y, kFrom> more = {};
          float weights[8];
          load_weights<kFrom>(weights, p, group, i);
          more.fetch(p, row, i);
          f(more, weights, i);
        }
      }
    };
    if (has_row && has_own) {
      add(bits, w);
      each_more([&](const auto& more, const auto& weights, int /*i*/) { add(more, weights); });
    }
    sums = team_sum<kTeam>(sums, turn);
    if (!has_row || !has_own) continue;
    constexpr bool kNormed = kFrom == From::kOutput;
    const float scale =
        kNormed ? bits.scale : 1 / sqrtf(sums.x / static_cast<float>(p.width) + p.eps);
    const float norm = kNormed ? 1 : scale;  // what z is still to be multiplied by
    const float share = norm * norm * sums.y / static_cast<float>(p.width);
    // What the elements add to dw comes back in dw_parts.
    const auto finish = [&](const Bits<X, Y, kFrom>& from, const float(&weights)[8], int i,
                            float(&dw_parts)[8]) {
      const Values<X, Y, kFrom> values(p, from, weights);
      float dx[8] = {};
      float dgate[8];
      if (p.accumulate) from.dx.get(dx);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float z = values.z[e];
        const float dz = scale * (values.dy[e] * weights[e] - z * share);
        dw_parts[e] = values.dy[e] * z * norm;
        if constexpr (kFrom == From::kInputAndGate) {
          dgate[e] = values.slope[e] * (p.gate_first ? dz : weights[e] * scale);
          dx[e] += dz * values.before[e];
        } else {
          dx[e] += dz;
        }
      }
      const std::int64_t at = row * p.width + i;
      store_eight(p.dx + at, dx, p.count(i));
      if (p.rounded != nullptr) store_eight(p.rounded + at, dx, p.count(i));
      if constexpr (kFrom == From::kInputAndGate) store_eight(p.dgate + at, dgate, p.count(i));
    };
    float parts[8];
    finish(bits, w, own, parts);
#pragma unroll
    for (int e = 0; e < 8; ++e) dw[e] += parts[e];
    // Longer rows have their sums in memory.
    each_more([&](const auto& more, const auto& weights, int i) {
      finish(more, weights, i, parts);
      if (partials == nullptr) return;
      Eight<float> before = {};
      if (row != first) load_eight(before, partials + i, p.count(i));
      float sum[8];
      before.get(sum);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += parts[e];
      store_eight(partials + i, sum, p.count(i));
    });
  }
  if (partials == nullptr) return;
  if constexpr (kTeams > 1) {
    __shared__ float sums[kTeams][kTeam * 8 + 4];
    Eight<float>::store(&sums[threadIdx.x / kTeam][own], dw);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < p.width; i += kBlock<kTeam>) {
      float sum = 0;
#pragma unroll
      for (int team = 0; team < kTeams; ++team) sum += sums[team][i];
      partials[i] = sum;
    }
  } else {
    if (has_own) store_eight(partials + own, dw, p.count(own));
  }
}

Shape matrix(std::int64_t rows, std::int64_t columns) {
  return {rows, columns};
}

template <int kTeam, typename X, typename Y>
void launch(Context& ctx, Params<X, Y> p, std::int64_t max_blocks, float* dw) {
  constexpr int kTeams = kBlock<kTeam> / kTeam;
  // As many blocks on every GPU, so that sums have one order; whole sets of groups.
  const std::int64_t most = std::min(max_blocks, (p.rows + kTeams - 1) / kTeams);
  const std::int64_t blocks = std::max<std::int64_t>(1, most / p.groups) * p.groups;
  ScratchScope scratch(ctx);
  if (dw != nullptr) p.partials = scratch.tensor(matrix(blocks, p.width)).f32();
  auto* kernel = rms_norm_backward_kernel<X, Y, From::kInput, kTeam>;
  if (p.gate != nullptr) kernel = rms_norm_backward_kernel<X, Y, From::kInputAndGate, kTeam>;
  if (p.x == nullptr) kernel = rms_norm_backward_kernel<X, Y, From::kOutput, kTeam>;
  kernel<<<static_cast<unsigned>(blocks), kBlock<kTeam>, 0, stream_of(ctx)>>>(p);
  check_launch("rms_norm_backward");
  if (dw == nullptr) return;
  const int sums = p.groups * p.width;
  add_column_sums(ctx, "rms_norm_backward", blocks / p.groups, sums, dw,
                  MatrixElements{p.partials, sums});
}

template <typename X, typename Y>
void launch_as(Context& ctx, const RmsNormBackwardArgs& args) {
  const std::int64_t width = args.dy.shape[1];
  const std::int64_t groups = args.w.data == nullptr ? 1 : args.w.shape.size() / width;
  Params<X, Y> p{
      .x = static_cast<const X*>(args.x.data),
      .y = static_cast<const Y*>(args.y.data),
      .scales = static_cast<const float*>(args.scales.data),
      .dy = static_cast<const Y*>(args.dy.data),
      .gate = static_cast<const Y*>(args.gate.data),
      .w = static_cast<const float*>(args.w.data),
      .dx = static_cast<X*>(args.dx.data),
      .dgate = static_cast<Y*>(args.dgate.data),
      .rounded = static_cast<bf16*>(args.rounded.data),
      .partials = nullptr,
      .gate_first = args.gate_first,
      .accumulate = args.accumulate_dx,
      .activation = args.gate_activation,
      .rows = args.dy.shape[0],
      .width = static_cast<int>(width),
      .groups = static_cast<int>(std::max<std::int64_t>(1, groups)),
      .eps = args.eps,
      .aligned = false,
  };
  const auto bits = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
  p.aligned = width % 8 == 0 && (bits(p.x) | bits(p.y) | bits(p.dy) | bits(p.gate) | bits(p.w) |
                                 bits(p.dx) | bits(p.dgate) | bits(p.rounded)) %
                                        16 ==
                                    0;
  auto* dw = static_cast<float*>(args.dw.data);
  if (width <= 128) {
    launch<16>(ctx, p, 528, dw);
  } else if (width <= 256) {
    launch<32>(ctx, p, 528, dw);
  } else if (width <= 1536) {
    launch<192>(ctx, p, 660, dw);
  } else {
    launch<kLargestTeam>(ctx, p, 264, dw);
  }
}

}  // namespace

void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args) {
  if (args.dy.shape.size() == 0) return;
  if (args.dy.dtype == DType::kF32) {
    launch_as<float, float>(ctx, args);
  } else if (args.dx.dtype == DType::kF32) {
    launch_as<float, bf16>(ctx, args);
  } else {
    launch_as<bf16, bf16>(ctx, args);
  }
}

}  // namespace deltafox::cuda
