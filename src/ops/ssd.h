// Mamba-2's state space, per head, on a state S [N,P] with one decay a head:
//   Δ = clamp(softplus(dt + dt_bias), dt_min, dt_max),  a = e^(−e^a_log · Δ),
//   S ← a S + b (Δ x)ᵀ,  y = Sᵀ c + d x
// b and c are shared by the H/G heads of a group.
//
// cpu::ssd works in chunks of 32 tokens (Dao & Gu, "Transformers are SSMs", 2024): with S the state
// before the chunk, u_t = Δ_t x_t and A_ts = Π_{s<r≤t} a_r,
//   Y = diag(A_t0) C S + (tril(C Bᵀ) ⊙ A) U + d X,  S ← A_n0 S + Σ_s A_ns b_s u_sᵀ.
// log A is summed from s to t, never taken as a difference of two long sums, so strong decays cost
// no precision. Chunks start at the first row of each sequence of the call; short chunks use the
// recurrence itself.
#pragma once

#include <span>

#include "core/context.h"
#include "core/sequences.h"

namespace deltafox {

constexpr std::int64_t kSsdChunk = 32;

struct SsdArgs {
  ConstTensorView xbc;      // [T, H·P + 2·G·N]: x [H,P], b [G,N], c [G,N] of each token
  ConstTensorView dt;       // [T, H]
  ConstTensorView dt_bias;  // [H]
  ConstTensorView a_log;    // [H]
  ConstTensorView d;        // [H]
  float dt_min = 0;
  float dt_max = 0;  // may be infinite
  std::int64_t num_groups = 1;
  Sequences sequences;
  std::span<float* const> states;  // [B], each [H, N, P]; updated
  TensorView y;                    // [T, H, P]

  std::int64_t state_size() const {  // N
    return (xbc.shape[1] - y.shape[1] * y.shape[2]) / (2 * num_groups);
  }
};

// Of whole sequences, which begin from a zero state. With dS the gradient of the state behind a
// token and u = Δ x, per token from the last to the first:
//   dS ← dS + c dyᵀ,  dc = S dy,  db = dS u,  du = dSᵀ b,  da = Σ dS · S₋,  dS₋ = a dS,
//   dx = Δ du + d dy,  dΔ = du·x − e^a_log a da,  d a_log = −Δ e^a_log a da,  dd = dy·x
// (S₋: the state before the token), summed over what shares b, c and the parameters. Where Δ is
// clamped, dt gets nothing.
//
// On a GPU xbc, dxbc and dy are each F32 or of the Context's activation dtype, the rest is F32.
struct SsdBackwardArgs {
  ConstTensorView xbc;      // [T, H·P + 2·G·N]
  ConstTensorView dt;       // [T, H]
  ConstTensorView dt_bias;  // [H]
  ConstTensorView a_log;    // [H]
  ConstTensorView d;        // [H]
  float dt_min = 0;
  float dt_max = 0;
  std::int64_t num_groups = 1;
  Sequences sequences;
  ConstTensorView dy;    // [T, H, P]
  TensorView dxbc;       // [T, H·P + 2·G·N], =
  TensorView ddt;        // [T, H], =
  TensorView d_dt_bias;  // [H], +=
  TensorView d_a_log;    // [H], +=
  TensorView dd;         // [H], +=

  std::int64_t state_size() const {  // N
    return (xbc.shape[1] - dy.shape[1] * dy.shape[2]) / (2 * num_groups);
  }
};

// One token of each of B sequences on a GPU, and what comes behind: y · silu(z).
struct SsdStepArgs {
  ConstTensorView xbc;      // [B, H·P + 2·G·N] F32
  ConstTensorView dt;       // [B, H]
  ConstTensorView dt_bias;  // [H]
  ConstTensorView a_log;    // [H]
  ConstTensorView d;        // [H]
  float dt_min = 0;
  float dt_max = 0;
  std::int64_t num_groups = 1;
  std::span<float* const> states;  // [B], each [H, N, P]; updated
  ConstTensorView z;               // [B, H, P] F32
  TensorView y;                    // [B, H, P] F32

  std::int64_t state_size() const {  // N
    return (xbc.shape[1] - y.shape[1] * y.shape[2]) / (2 * num_groups);
  }
};

namespace ops {
void ssd_step(Context& ctx, const SsdStepArgs& args);
void ssd(Context& ctx, const SsdArgs& args);
void ssd_backward(Context& ctx, const SsdBackwardArgs& args);
}  // namespace ops
namespace cpu {
void ssd(Context& ctx, const SsdArgs& args);
void ssd_backward(Context& ctx, const SsdBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void ssd_step(Context& ctx, const SsdStepArgs& args);
void ssd(Context& ctx, const SsdArgs& args);
void ssd_backward(Context& ctx, const SsdBackwardArgs& args);
}  // namespace cuda
namespace reference {
void ssd(const SsdArgs& args);
void ssd_backward(const SsdBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
