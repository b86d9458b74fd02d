// Backward of the ops that touch each element once. All are bound by memory; see the headers of
// ops/ for the equations.
#include "cuda/column_sums.cuh"
#include "cuda/each_four.cuh"
#include "cuda/eight.cuh"
#include "ops/activation.h"
#include "ops/gate.h"
#include "ops/log_sigmoid.h"

namespace deltafox::cuda {
namespace {

constexpr int kWarps = kElementThreads / 32;
constexpr int kKept = 4;  // vectors of a lane that stay in registers

struct FeatureMapParams {
  Elements x, dy, dx;
  Activation activation;
  FeatureNorm norm;
  std::int64_t rows;
  int width;
  bool aligned;
};

// A warp a row.
__global__ void __launch_bounds__(kElementThreads)
    feature_map_backward_kernel(const FeatureMapParams p) {
  const int lane = threadIdx.x % 32;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const std::int64_t base = row * p.width;
  const auto count = [&](int i) { return p.aligned ? kVector : min(4, p.width - i); };
  uint4 x_bits[kKept];
  uint4 dy_bits[kKept];
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int i = (n * 32 + lane) * 4;
    if (i >= p.width) break;
    x_bits[n] = p.x.fetch(base + i, count(i));
    dy_bits[n] = p.dy.fetch(base + i, count(i));
  }
  float sum = 0;  // of a or of its squares
  float dot = 0;
  const auto add = [&](const uint4& x_raw, const uint4& dy_raw, int i) {
    float x[4];
    float dy[4];
    p.x.widen(x, x_raw);
    p.dy.widen(dy, dy_raw);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (i + e >= p.width) break;
      const float a = activate(p.activation, x[e]);
      sum += p.norm == FeatureNorm::kL2 ? a * a : a;
      dot = fmaf(a, dy[e], dot);
    }
  };
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int i = (n * 32 + lane) * 4;
    if (i < p.width) add(x_bits[n], dy_bits[n], i);
  }
  for (int i = (kKept * 32 + lane) * 4; i < p.width; i += 128) {
    add(p.x.fetch(base + i, count(i)), p.dy.fetch(base + i, count(i)), i);
  }
  sum = warp_sum(sum);
  dot = warp_sum(dot);
  // da = scale · dy − slope · a, or scale · dy − slope
  float scale = 1;
  float slope = 0;
  if (p.norm == FeatureNorm::kL2) {
    scale = 1 / sqrtf(sum + 1e-6F);
    slope = scale * scale * scale * dot;
  } else if (p.norm == FeatureNorm::kSum) {
    scale = 1 / sum;
    slope = dot * scale * scale;
  }
  const auto finish = [&](const uint4& x_raw, const uint4& dy_raw, int i) {
    float x[4];
    float dx[4];
    p.x.widen(x, x_raw);
    p.dy.widen(dx, dy_raw);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float a = p.norm == FeatureNorm::kSum ? 1 : activate(p.activation, x[e]);
      dx[e] = (scale * dx[e] - slope * a) * activation_slope(p.activation, x[e]);
    }
    p.dx.store(dx, base + i, count(i));
  };
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int i = (n * 32 + lane) * 4;
    if (i < p.width) finish(x_bits[n], dy_bits[n], i);
  }
  for (int i = (kKept * 32 + lane) * 4; i < p.width; i += 128) {
    finish(p.x.fetch(base + i, count(i)), p.dy.fetch(base + i, count(i)), i);
  }
}

// A block a row.
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    glu_rows_kernel(const T* gate_up, const T* dy, T* dgate_up, T* y, Activation activation,
                    int width) {
  const std::ptrdiff_t row = blockIdx.x;
  gate_up += row * 2 * width;
  dgate_up += row * 2 * width;
  for (int i = static_cast<int>(threadIdx.x) * 8; i < width; i += kElementThreads * 8) {
    Eight<T> bits[3];
    bits[0].load(gate_up + i);
    bits[1].load(gate_up + width + i);
    bits[2].load(dy + row * width + i);
    float gate[8];
    float up[8];
    float d[8];
    bits[0].get(gate);
    bits[1].get(up);
    bits[2].get(d);
    float product[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float2 act = activate_with_slope<sizeof(T) == 2>(activation, gate[e]);
      product[e] = act.x * up[e];
      gate[e] = d[e] * up[e] * act.y;
      up[e] = d[e] * act.x;
    }
    Eight<T>::store(dgate_up + i, gate);
    Eight<T>::store(dgate_up + width + i, up);
    if (y != nullptr) Eight<T>::store(y + row * width + i, product);
  }
}

template <typename T>
void launch_glu_rows(Context& ctx, const GluBackwardArgs& args) {
  glu_rows_kernel<<<static_cast<unsigned>(args.dy.shape[0]), kElementThreads, 0, stream_of(ctx)>>>(
      static_cast<const T*>(args.gate_up.data), static_cast<const T*>(args.dy.data),
      static_cast<T*>(args.dgate_up.data), static_cast<T*>(args.y.data), args.activation,
      static_cast<int>(args.dy.shape[1]));
  check_launch("glu_backward");
}

struct GluParams {
  Elements gate_up, dy, dgate_up, y;
  bool has_y;
  Activation activation;
  std::int64_t width;

  // Four elements of a row, at i of dy; `row` is the row's number.
  __device__ void four(std::int64_t i, std::int64_t row, int count) const {
    const std::int64_t gate_at = i + row * width;
    const std::int64_t up_at = gate_at + width;
    const uint4 gate_bits = gate_up.fetch(gate_at, count);
    const uint4 up_bits = gate_up.fetch(up_at, count);
    const uint4 dy_bits = dy.fetch(i, count);
    float gate[4];
    float up[4];
    float d[4];
    gate_up.widen(gate, gate_bits);
    gate_up.widen(up, up_bits);
    dy.widen(d, dy_bits);
    float product[4];
    float dup[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float a = activate(activation, gate[e]);
      product[e] = a * up[e];
      dup[e] = d[e] * a;
      gate[e] = d[e] * up[e] * activation_slope(activation, gate[e]);
    }
    dgate_up.store(gate, gate_at, count);
    dgate_up.store(dup, up_at, count);
    if (has_y) y.store(product, i, count);
  }
};

// d log σ(x) / dx = 1 − σ(x) = 1 − e^y
struct LogSigmoidGradient {
  const float* y;   // [T, H]
  const float* dy;  // [T, H]
  float* dx;        // [T, H] or null
  std::int64_t heads;

  __device__ float operator()(std::int64_t t, std::int64_t h) const {
    const std::int64_t i = t * heads + h;
    const float d = -dy[i] * expm1f(y[i]);
    if (dx != nullptr) dx[i] = d;
    return d;
  }
};

}  // namespace

void activation_backward(Context& ctx, const ActivationBackwardArgs& args) {
  const Elements x(args.x);
  const Elements dy(args.dy);
  const Elements dx(args.dx);
  const Activation kind = args.activation;
  each_four(ctx, "activation_backward", args.x.shape.size(),
            x.aligned() && dy.aligned() && dx.aligned(), [=] __device__(std::int64_t i, int count) {
              const uint4 x_bits = x.fetch(i, count);
              const uint4 dy_bits = dy.fetch(i, count);
              float at[4];
              float d[4];
              x.widen(at, x_bits);
              dy.widen(d, dy_bits);
#pragma unroll
              for (int e = 0; e < 4; ++e) d[e] *= activation_slope(kind, at[e]);
              dx.store(d, i, count);
            });
}

void glu_backward(Context& ctx, const GluBackwardArgs& args) {
  const GluParams p{.gate_up = Elements(args.gate_up),
                    .dy = Elements(args.dy),
                    .dgate_up = Elements(args.dgate_up),
                    .y = Elements(args.y),
                    .has_y = args.y.data != nullptr,
                    .activation = args.activation,
                    .width = args.dy.shape[1]};
  if (args.dy.shape.size() == 0) return;
  const bool aligned = p.width % 4 == 0 && p.gate_up.aligned() && p.dy.aligned() &&
                       p.dgate_up.aligned() && p.y.aligned();
  const DType dtype = args.dy.dtype;
  if (aligned && p.width % 8 == 0 && args.gate_up.dtype == dtype && args.dgate_up.dtype == dtype &&
      (!p.has_y || args.y.dtype == dtype)) {
    dtype == DType::kBF16 ? launch_glu_rows<bf16>(ctx, args) : launch_glu_rows<float>(ctx, args);
    return;
  }
  each_four(ctx, "glu_backward", args.dy.shape.size(), aligned,
            [=] __device__(std::int64_t i, int count) {
              if (count == kVector) {
                p.four(i, i / p.width, count);
                return;
              }
              // Rows that no vector divides: element by element.
              for (int e = 0; e < count; ++e) p.four(i + e, (i + e) / p.width, 1);
            });
}

void forget_gate_backward(Context& ctx, const ForgetGateBackwardArgs& args) {
  const Elements g(args.g);
  const Elements k(args.k);
  const Elements dg(args.dg);
  const Elements dk(args.dk);
  const Elements dx(args.dx);
  each_four(ctx, "forget_gate_backward", args.g.shape.size(),
            g.aligned() && k.aligned() && dg.aligned() && dk.aligned() && dx.aligned(),
            [=] __device__(std::int64_t i, int count) {
              const uint4 bits[4] = {g.fetch(i, count), k.fetch(i, count), dg.fetch(i, count),
                                     dk.fetch(i, count)};
              float gate[4];
              float key[4];
              float d[4];
              float minus[4];
              g.widen(gate, bits[0]);
              k.widen(key, bits[1]);
              dg.widen(d, bits[2]);
              dk.widen(minus, bits[3]);
#pragma unroll
              for (int e = 0; e < 4; ++e) d[e] = (d[e] - minus[e]) * (gate[e] * key[e]);
              dx.store(d, i, count);
            });
}

void feature_map_backward(Context& ctx, const FeatureMapBackwardArgs& args) {
  FeatureMapParams p{.x = Elements(args.x),
                     .dy = Elements(args.dy),
                     .dx = Elements(args.dx),
                     .activation = args.activation,
                     .norm = args.norm,
                     .rows = args.x.shape[0] * args.x.shape[1],
                     .width = static_cast<int>(args.x.shape[2]),
                     .aligned = false};
  if (p.rows == 0) return;
  p.aligned = p.width % 4 == 0 && p.x.aligned() && p.dy.aligned() && p.dx.aligned();
  feature_map_backward_kernel<<<blocks_for(p.rows, kWarps), kElementThreads, 0, stream_of(ctx)>>>(
      p);
  check_launch("feature_map_backward");
}

void gate_backward(Context& ctx, const GateBackwardArgs& args) {
  const Elements gate(args.gate);
  const Elements x(args.x);
  const Elements dy(args.dy);
  const Elements dx(args.dx);
  const Elements dgate(args.dgate);
  const Activation kind = args.activation;
  each_four(ctx, "gate_backward", args.x.shape.size(),
            gate.aligned() && x.aligned() && dy.aligned() && dx.aligned() && dgate.aligned(),
            [=] __device__(std::int64_t i, int count) {
              const uint4 bits[3] = {gate.fetch(i, count), x.fetch(i, count), dy.fetch(i, count)};
              float g[4];
              float at[4];
              float d[4];
              gate.widen(g, bits[0]);
              x.widen(at, bits[1]);
              dy.widen(d, bits[2]);
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                at[e] *= d[e] * activation_slope(kind, g[e]);
                d[e] *= activate(kind, g[e]);
              }
              dgate.store(at, i, count);
              dx.store(d, i, count);
            });
}

void log_sigmoid_backward(Context& ctx, const LogSigmoidBackwardArgs& args) {
  const LogSigmoidGradient gradient{.y = args.y.f32(),
                                    .dy = args.dy.f32(),
                                    .dx = static_cast<float*>(args.dx.data),
                                    .heads = args.y.shape[1]};
  if (args.dbias.data != nullptr) {
    add_column_sums(ctx, "log_sigmoid_backward", args.y.shape[0], static_cast<int>(args.y.shape[1]),
                    args.dbias.f32(), gradient);
    return;
  }
  each_four(ctx, "log_sigmoid_backward", args.y.shape.size(), false,
            [=] __device__(std::int64_t i, int count) {
              for (int e = 0; e < count; ++e) gradient(0, i + e);
            });
}

}  // namespace deltafox::cuda
