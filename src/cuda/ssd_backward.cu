// The gradients of Mamba-2's state space (the equations are in ops/ssd.h), in float32: each token's
// steps and decays, the recurrence of decayed_backward.cuh with q = c, k = b, v = Δ x, and what
// they leave for x, dt and the parameters.
#include "cuda/column_sums.cuh"
#include "cuda/decayed_backward.cuh"
#include "cuda/each_four.cuh"
#include "ops/ssd.h"

namespace deltafox::cuda {
namespace {

struct Params {
  Elements xbc, dy, dxbc;
  const float* dt;       // [T, H]
  const float* dt_bias;  // [H]
  const float* a_log;    // [H]
  const float* d;        // [H]
  float dt_min, dt_max;
  std::int64_t tokens;
  int heads, groups, state_size, head_dim, tiles;
  float* steps;    // [T, H], Δ
  float* decays;   // [T, H], a
  float* du;       // [T, H, P]
  float* db;       // [T, H, N], each head's share
  float* dc;       // [T, H, N]
  float* d_decay;  // [tiles, T, H], shares of da
  float* ddt;      // [T, H]
  float* d_a_log;  // [T, H], each token's share
  float* dd;       // [T, H]

  __device__ std::ptrdiff_t row_size() const {
    return static_cast<std::ptrdiff_t>(heads) * head_dim + 2 * groups * state_size;
  }
  __device__ std::ptrdiff_t x_at(std::ptrdiff_t token, int head, int p) const {
    return token * row_size() + head * head_dim + p;
  }
  __device__ std::ptrdiff_t b_at(std::ptrdiff_t token, int group, int n) const {
    return token * row_size() + heads * head_dim + group * state_size + n;
  }
  __device__ std::ptrdiff_t c_at(std::ptrdiff_t token, int group, int n) const {
    return b_at(token, groups + group, n);
  }
  __device__ float softplus(float raw) const {
    return fmaxf(raw, 0.0F) + log1pf(expf(-fabsf(raw)));
  }
};

struct Source {
  static constexpr bool kOneGate = true;

  Params p;
  int heads;
  int rows;     // N
  int columns;  // P

  __device__ std::ptrdiff_t scalar_at(std::ptrdiff_t token, int head) const {
    return token * heads + head;
  }
  __device__ int group(int head) const { return head / (heads / p.groups); }
  __device__ float q(std::ptrdiff_t token, int head, int row) const {
    return p.xbc.get(p.c_at(token, group(head), row));
  }
  __device__ float k(std::ptrdiff_t token, int head, int row) const {
    return p.xbc.get(p.b_at(token, group(head), row));
  }
  __device__ float g(std::ptrdiff_t token, int head, int /*row*/) const {
    return p.decays[scalar_at(token, head)];
  }
  __device__ float v(std::ptrdiff_t token, int head, int column) const {
    return p.steps[scalar_at(token, head)] * p.xbc.get(p.x_at(token, head, column));
  }
  __device__ float d_o(std::ptrdiff_t token, int head, int column) const {
    return p.dy.get(scalar_at(token, head) * columns + column);
  }
  __device__ void store_dq(std::ptrdiff_t token, int head, int row, float d) const {
    p.dc[scalar_at(token, head) * rows + row] = d;
  }
  __device__ void store_dk(std::ptrdiff_t token, int head, int row, float d) const {
    p.db[scalar_at(token, head) * rows + row] = d;
  }
  __device__ void store_dg(std::ptrdiff_t token, int head, int tile, float d) const {
    p.d_decay[tile * p.tokens * heads + scalar_at(token, head)] = d;
  }
  __device__ void store_dv(std::ptrdiff_t token, int head, int column, float d) const {
    p.du[scalar_at(token, head) * columns + column] = d;
  }
};

// Δ and a of token i / H and head i % H.
struct Steps {
  Params p;

  __device__ void operator()(std::int64_t first, int count) const {
    for (std::int64_t i = first; i < first + count; ++i) {
      const int head = static_cast<int>(i % p.heads);
      const float raw = p.dt[i] + p.dt_bias[head];
      const float step = fminf(fmaxf(p.softplus(raw), p.dt_min), p.dt_max);
      p.steps[i] = step;
      p.decays[i] = expf(-expf(p.a_log[head]) * step);
    }
  }
};

// A warp a token of a head: dx, ddt and the parameters' shares.
__global__ void __launch_bounds__(kElementThreads) token_gradients(const Params p) {
  const std::int64_t i =
      static_cast<std::int64_t>(blockIdx.x) * (kElementThreads / 32) + threadIdx.x / 32;
  if (i >= p.tokens * p.heads) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::ptrdiff_t token = i / p.heads;
  const int head = static_cast<int>(i % p.heads);
  const float step = p.steps[i];
  const float skip = p.d[head];
  float du_x = 0;
  float dy_x = 0;
  for (int column = lane; column < p.head_dim; column += 32) {
    const std::ptrdiff_t at = p.x_at(token, head, column);
    const float x = p.xbc.get(at);
    const float du = p.du[i * p.head_dim + column];
    const float dy = p.dy.get(i * p.head_dim + column);
    p.dxbc.put(at, fmaf(step, du, skip * dy));
    du_x = fmaf(du, x, du_x);
    dy_x = fmaf(dy, x, dy_x);
  }
  du_x = warp_sum(du_x);
  dy_x = warp_sum(dy_x);
  if (lane != 0) return;
  float d_decay = 0;
  for (int tile = 0; tile < p.tiles; ++tile) d_decay += p.d_decay[tile * p.tokens * p.heads + i];
  // Of log a over Δ.
  const float d_log = -expf(p.a_log[head]) * p.decays[i] * d_decay;
  const float raw = p.dt[i] + p.dt_bias[head];
  const float softplus = p.softplus(raw);
  const bool clamped = softplus < p.dt_min || softplus > p.dt_max;
  p.ddt[i] = clamped ? 0 : (du_x + d_log) * sigmoid(raw);
  p.d_a_log[i] = step * d_log;
  p.dd[i] = dy_x;
}

// db and dc of a token and group: what each of its heads gives, in turn.
struct GroupSums {
  Params p;

  __device__ void operator()(std::int64_t first, int count) const {
    const int heads = p.heads / p.groups;
    for (std::int64_t i = first; i < first + count; ++i) {
      const int n = static_cast<int>(i % p.state_size);
      const std::int64_t token_group = i / p.state_size;
      const int group = static_cast<int>(token_group % p.groups);
      const std::ptrdiff_t token = token_group / p.groups;
      const std::ptrdiff_t from = (token * p.heads + group * heads) * p.state_size + n;
      float db = 0;
      float dc = 0;
#pragma unroll 8
      for (int h = 0; h < heads; ++h) {
        db += p.db[from + h * p.state_size];
        dc += p.dc[from + h * p.state_size];
      }
      p.dxbc.put(p.b_at(token, group, n), db);
      p.dxbc.put(p.c_at(token, group, n), dc);
    }
  }
};

}  // namespace

void ssd_backward(Context& ctx, const SsdBackwardArgs& args) {
  const std::int64_t tokens = args.dy.shape[0];
  const std::int64_t heads = args.dy.shape[1];
  const std::int64_t head_dim = args.dy.shape[2];
  const std::int64_t state_size = args.state_size();
  if (tokens == 0) return;
  const int tiles = decayed_tiles(static_cast<int>(state_size));
  ScratchScope scratch(ctx);
  const auto of_tokens = [&] { return scratch.tensor({tokens, heads}).f32(); };
  const Params p{.xbc = Elements(args.xbc),
                 .dy = Elements(args.dy),
                 .dxbc = Elements(args.dxbc),
                 .dt = args.dt.f32(),
                 .dt_bias = args.dt_bias.f32(),
                 .a_log = args.a_log.f32(),
                 .d = args.d.f32(),
                 .dt_min = args.dt_min,
                 .dt_max = args.dt_max,
                 .tokens = tokens,
                 .heads = static_cast<int>(heads),
                 .groups = static_cast<int>(args.num_groups),
                 .state_size = static_cast<int>(state_size),
                 .head_dim = static_cast<int>(head_dim),
                 .tiles = tiles,
                 .steps = of_tokens(),
                 .decays = of_tokens(),
                 .du = scratch.tensor({tokens, heads, head_dim}).f32(),
                 .db = scratch.tensor({tokens, heads, state_size}).f32(),
                 .dc = scratch.tensor({tokens, heads, state_size}).f32(),
                 .d_decay = scratch.tensor({tiles, tokens, heads}).f32(),
                 .ddt = args.ddt.f32(),
                 .d_a_log = of_tokens(),
                 .dd = of_tokens()};
  constexpr const char* kOp = "ssd_backward";
  each_four(ctx, kOp, tokens * heads, false, Steps{p});
  decayed_backward(ctx, kOp,
                   Source{.p = p, .heads = p.heads, .rows = p.state_size, .columns = p.head_dim},
                   args.sequences);
  token_gradients<<<blocks_for(tokens * heads, kElementThreads / 32), kElementThreads, 0,
                    stream_of(ctx)>>>(p);
  check_launch(kOp);
  each_four(ctx, kOp, tokens * args.num_groups * state_size, false, GroupSums{p});
  const auto add = [&](const float* shares, const TensorView& to) {
    add_column_sums(ctx, kOp, tokens, p.heads, to.f32(), MatrixElements{shares, p.heads});
  };
  add(p.ddt, args.d_dt_bias);
  add(p.d_a_log, args.d_a_log);
  add(p.dd, args.dd);
}

}  // namespace deltafox::cuda
