// Gated linear attention, per head, on a state S [K,V]:
//   S ← diag(g) S + k vᵀ,  o = Sᵀ q / √K
//
// cpu::gla works in chunks of 16 tokens (Yang et al., "Gated Linear Attention Transformers with
// Hardware-Efficient Training", 2024): with S the state before the chunk and Γ_t = g_1 ⊙ … ⊙ g_t,
//   O = ((Q ⊙ Γ) S + A V) / √K,  A_ts = Σ_i q_ti k_si Π_{s<r≤t} g_ri  (s ≤ t),
//   S ← diag(Γ_n) S + Σ_s (k_s ⊙ Π_{r>s} g_r) v_sᵀ.
// Every product of gates is taken forward in time, factor by factor: none is a quotient of two long
// ones, so gates near zero cost no precision. Chunks start at the first row of each sequence of the
// call; short chunks use the recurrence itself.
#pragma once

#include <span>

#include "core/context.h"
#include "core/sequences.h"

namespace deltafox {

constexpr std::int64_t kGlaChunk = 16;

struct GlaArgs {
  ConstTensorView q;  // [T, H, K]
  ConstTensorView k;  // [T, H, K]
  ConstTensorView g;  // [T, H, K], in [0, 1]
  ConstTensorView v;  // [T, H, V]
  Sequences sequences;
  std::span<float* const> states;  // [B], each [H, K, V]; updated
  TensorView o;                    // [T, H, V]
};

// Of whole sequences, which begin from a zero state. With dS the gradient of the state behind a
// token, per token from the last to the first:
//   dS ← dS + q doᵀ / √K,  dq = S do / √K,  dk = dS v,  dv = dSᵀ k,  dg_i = Σ_j dS_ij S₋_ij,
//   dS₋ = diag(g) dS     (S₋: the state before the token)
//
// On a GPU q, v, d_o, dq and dv are each F32 or of the Context's activation dtype, the rest is F32.
struct GlaBackwardArgs {
  ConstTensorView q;  // [T, H, K]
  ConstTensorView k;  // [T, H, K]
  ConstTensorView g;  // [T, H, K]
  ConstTensorView v;  // [T, H, V]
  Sequences sequences;
  ConstTensorView d_o;  // [T, H, V]
  TensorView dq;        // [T, H, K], =
  TensorView dk;        // [T, H, K], =
  TensorView dg;        // [T, H, K], =
  TensorView dv;        // [T, H, V], =
};

// One token of each of B sequences on a GPU, from what the projections give: q ← silu(q), g = σ(f),
// k = σ(−f), then as above.
struct GlaStepArgs {
  ConstTensorView q;               // [B, H, K] F32
  ConstTensorView f;               // [B, H, K] F32
  ConstTensorView v;               // [B, H, V] F32
  std::span<float* const> states;  // [B], each [H, K, V]; updated
  TensorView o;                    // [B, H, V] F32
};

namespace ops {
void gla_step(Context& ctx, const GlaStepArgs& args);
void gla(Context& ctx, const GlaArgs& args);
void gla_backward(Context& ctx, const GlaBackwardArgs& args);
}  // namespace ops
namespace cpu {
void gla(Context& ctx, const GlaArgs& args);
void gla_backward(Context& ctx, const GlaBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void gla_step(Context& ctx, const GlaStepArgs& args);
void gla(Context& ctx, const GlaArgs& args);
void gla_backward(Context& ctx, const GlaBackwardArgs& args);
}  // namespace cuda
namespace reference {
void gla(const GlaArgs& args);
void gla_backward(const GlaBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
