// The gradients of Mamba-2's state space (the equations are in ops/ssd.h). For any shapes in
// float32: each token's steps and decays, the recurrence of decayed_backward.cuh with q = c, k = b,
// v = Δ x, and what they leave for x, dt and the parameters.
#include "ops/ssd.h"

#include "cuda/column_sums.cuh"
#include "cuda/decayed_backward.cuh"
#include "cuda/each_four.cuh"
#include "cuda/ssd_backward.cuh"

namespace deltafox::cuda {
namespace {

constexpr const char* kOp = "ssd_backward";

struct Source {
  static constexpr bool kOneGate = true;

  SsdGradients p;
  float* steps;    // [T, H], Δ
  float* decays;   // [T, H], a
  float* du;       // [T, H, P]
  float* d_decay;  // [tiles, T, H], shares of da
  int heads;
  int rows;     // N
  int columns;  // P

  __device__ int group(int head) const { return head / (heads / p.groups); }
  __device__ float q(std::ptrdiff_t token, int head, int row) const {
    return p.xbc.get(p.c_at(token, group(head), row));
  }
  __device__ float k(std::ptrdiff_t token, int head, int row) const {
    return p.xbc.get(p.b_at(token, group(head), row));
  }
  __device__ float g(std::ptrdiff_t token, int head, int /*row*/) const {
    return decays[p.scalar_at(token, head)];
  }
  __device__ float v(std::ptrdiff_t token, int head, int column) const {
    return steps[p.scalar_at(token, head)] * p.xbc.get(p.x_at(token, head, column));
  }
  __device__ float d_o(std::ptrdiff_t token, int head, int column) const {
    return p.dy.get(p.scalar_at(token, head) * columns + column);
  }
  __device__ void store_dq(std::ptrdiff_t token, int head, int row, float d) const {
    p.dc[p.scalar_at(token, head) * rows + row] = d;
  }
  __device__ void store_dk(std::ptrdiff_t token, int head, int row, float d) const {
    p.db[p.scalar_at(token, head) * rows + row] = d;
  }
  __device__ void store_dg(std::ptrdiff_t token, int head, int tile, float d) const {
    d_decay[tile * p.tokens * heads + p.scalar_at(token, head)] = d;
  }
  __device__ void store_dv(std::ptrdiff_t token, int head, int column, float d) const {
    du[p.scalar_at(token, head) * columns + column] = d;
  }
};

// Δ and a of token i / H and head i % H.
struct Steps {
  Source s;

  __device__ void operator()(std::int64_t first, int count) const {
    for (std::int64_t i = first; i < first + count; ++i) {
      const int head = static_cast<int>(i % s.heads);
      s.steps[i] = s.p.step(i, head);
      s.decays[i] = expf(-expf(s.p.a_log[head]) * s.steps[i]);
    }
  }
};

// A warp a token of a head: dx, ddt and the parameters' shares.
__global__ void __launch_bounds__(kElementThreads) token_gradients(const Source s, int tiles) {
  const SsdGradients& p = s.p;
  const std::int64_t i =
      static_cast<std::int64_t>(blockIdx.x) * (kElementThreads / 32) + threadIdx.x / 32;
  if (i >= p.tokens * p.heads) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::ptrdiff_t token = i / p.heads;
  const int head = static_cast<int>(i % p.heads);
  const float step = s.steps[i];
  const float skip = p.d[head];
  float du_x = 0;
  float dy_x = 0;
  for (int column = lane; column < p.head_dim; column += 32) {
    const std::ptrdiff_t at = p.x_at(token, head, column);
    const float x = p.xbc.get(at);
    const float du = s.du[i * p.head_dim + column];
    const float dy = p.dy.get(i * p.head_dim + column);
    p.dxbc.put(at, fmaf(step, du, skip * dy));
    du_x = fmaf(du, x, du_x);
    dy_x = fmaf(dy, x, dy_x);
  }
  du_x = warp_sum(du_x);
  dy_x = warp_sum(dy_x);
  if (lane != 0) return;
  float d_decay = 0;
  for (int tile = 0; tile < tiles; ++tile) d_decay += s.d_decay[tile * p.tokens * p.heads + i];
  p.finish_token(i, head, du_x, dy_x, s.decays[i] * d_decay);
}

// db and dc of a token and group: its shares in turn.
struct GroupSums {
  SsdGradients p;

  __device__ void operator()(std::int64_t first, int count) const {
    const int shares = p.shares / p.groups;
    for (std::int64_t i = first; i < first + count; ++i) {
      const int n = static_cast<int>(i % p.state_size);
      const std::int64_t token_group = i / p.state_size;
      const int group = static_cast<int>(token_group % p.groups);
      const std::ptrdiff_t from = token_group * shares * p.state_size + n;
      float db = 0;
      float dc = 0;
#pragma unroll 8
      for (int share = 0; share < shares; ++share) {
        db += p.db[from + share * p.state_size];
        dc += p.dc[from + share * p.state_size];
      }
      const std::ptrdiff_t token = token_group / p.groups;
      p.dxbc.put(p.b_at(token, group, n), db);
      p.dxbc.put(p.c_at(token, group, n), dc);
    }
  }
};

void plain(Context& ctx, const SsdGradients& p, const Sequences& sequences) {
  const int tiles = decayed_tiles(p.state_size);
  ScratchScope scratch(ctx);
  const auto floats = [&](const Shape& shape) { return scratch.tensor(shape).f32(); };
  const Source source{.p = p,
                      .steps = floats({p.tokens, p.heads}),
                      .decays = floats({p.tokens, p.heads}),
                      .du = floats({p.tokens, p.heads, p.head_dim}),
                      .d_decay = floats({tiles, p.tokens, p.heads}),
                      .heads = p.heads,
                      .rows = p.state_size,
                      .columns = p.head_dim};
  each_four(ctx, kOp, p.tokens * p.heads, false, Steps{source});
  decayed_backward(ctx, kOp, source, sequences);
  token_gradients<<<blocks_for(p.tokens * p.heads, kElementThreads / 32), kElementThreads, 0,
                    stream_of(ctx)>>>(source, tiles);
  check_launch(kOp);
}

}  // namespace

void ssd_backward(Context& ctx, const SsdBackwardArgs& args) {
  const std::int64_t tokens = args.dy.shape[0];
  const std::int64_t heads = args.dy.shape[1];
  if (tokens == 0) return;
  ScratchScope scratch(ctx);
  SsdGradients p{.xbc = Elements(args.xbc),
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
                 .state_size = static_cast<int>(args.state_size()),
                 .head_dim = static_cast<int>(args.dy.shape[2]),
                 .shares = static_cast<int>(heads),
                 .db = nullptr,
                 .dc = nullptr,
                 .ddt = args.ddt.f32(),
                 .d_a_log = scratch.tensor({tokens, heads}).f32(),
                 .dd = scratch.tensor({tokens, heads}).f32()};
  const bool chunks = ssd_backward_chunks_fit(p);
  if (chunks) p.shares /= ssd_heads_at_once(p.heads / p.groups);
  p.db = scratch.tensor({tokens, p.shares, p.state_size}).f32();
  p.dc = scratch.tensor({tokens, p.shares, p.state_size}).f32();
  chunks ? ssd_backward_chunks(ctx, p, args.sequences) : plain(ctx, p, args.sequences);
  each_four(ctx, kOp, tokens * p.groups * p.state_size, false, GroupSums{p});
  const auto add = [&](const float* shares, const TensorView& to) {
    add_column_sums(ctx, kOp, tokens, p.heads, to.f32(), MatrixElements{shares, p.heads});
  };
  add(p.ddt, args.d_dt_bias);
  add(p.d_a_log, args.d_a_log);
  add(p.dd, args.dd);
}

}  // namespace deltafox::cuda
