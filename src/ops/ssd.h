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

namespace ops {
void ssd(Context& ctx, const SsdArgs& args);
}
namespace cpu {
void ssd(Context& ctx, const SsdArgs& args);
}
namespace cuda {
void ssd(Context& ctx, const SsdArgs& args);
}
namespace reference {
void ssd(const SsdArgs& args);
}
}  // namespace deltafox
