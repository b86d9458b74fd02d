// The delta rule, per head, on a state S [K,V]:
//   u = β (v − Sᵀk),  S ← S + k uᵀ,  o = Sᵀ q / √K
//
// cpu::delta_rule works in chunks of 64 tokens (Yang et al., "Parallelizing Linear Transformers
// with the Delta Rule over Sequence Length", 2024): with G = tril(K Kᵀ, −1) and S the state before
// the chunk,
//   (I + diag(β) G) U = diag(β) (V − K S),  O = (Q S + tril(Q Kᵀ) U) / √K,  S ← S + Kᵀ U.
// Chunks start at the first row of each sequence of the call, so splitting a call elsewhere than at
// a multiple of 64 changes results by rounding; short chunks use the recurrence itself.
#pragma once

#include <span>

#include "core/context.h"
#include "core/sequences.h"

namespace deltafox {

struct DeltaInputsArgs;  // ops/delta_mixer.h

constexpr std::int64_t kDeltaRuleChunk = 64;

struct DeltaRuleArgs {
  ConstTensorView q;          // [T, H, K]
  ConstTensorView k;          // [T, H, K]
  ConstTensorView v;          // [T, H, V]
  ConstTensorView beta = {};  // [T, H], or no data for β = 1
  Sequences sequences;
  std::span<float* const> states;  // [B], each [H, K, V]; updated
  // The CPU may round the operands of a chunk's products to bfloat16, a copy of S among them, where
  // it has tiles for such products; sums, S and the solution within 32 tokens stay float32.
  bool bf16_products = false;
  TensorView o;  // [T, H, V]
  // [V] F32: o ← rms_norm(o) · norm of each head, with norm_eps (ops/rms_norm.h); or no data.
  ConstTensorView norm = {};
  float norm_eps = 0;
  // On a GPU: delta_inputs with these, whose sequences, q, k, v and beta are the above, belongs
  // before; its kernels may do both, and need not write q, k, v and beta then.
  const DeltaInputsArgs* inputs = nullptr;
  ConstTensorView next = {};  // weights that a GPU may ask its caches for, as they come next
};

// Of whole sequences, which begin from a zero state. With dS the gradient of the state behind a
// token, per token from the last to the first:
//   dS ← dS + q doᵀ / √K,  dq = S do / √K,  du = dSᵀ k,  dv = β du,  dβ = du·(v − S₋ᵀk),
//   dk = dS u − β S₋ du,  dS₋ = dS − β k duᵀ     (S₋: the state before the token)
// cpu::delta_rule_backward works in the same chunks as the forward, whose states it computes again:
// docs/numerics.md.
struct DeltaRuleBackwardArgs {
  ConstTensorView q;          // [T, H, K]
  ConstTensorView k;          // [T, H, K]
  ConstTensorView v;          // [T, H, V]
  ConstTensorView beta = {};  // [T, H], or no data for β = 1
  Sequences sequences;
  ConstTensorView d_o;    // [T, H, V]
  TensorView dq;          // [T, H, K], =
  TensorView dk;          // [T, H, K], =
  TensorView dv;          // [T, H, V], =
  TensorView dbeta = {};  // [T, H], =; with beta
};

namespace ops {
void delta_rule(Context& ctx, const DeltaRuleArgs& args);
void delta_rule_backward(Context& ctx, const DeltaRuleBackwardArgs& args);
}  // namespace ops
namespace cpu {
void delta_rule(Context& ctx, const DeltaRuleArgs& args);
void delta_rule_backward(Context& ctx, const DeltaRuleBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void delta_rule(Context& ctx, const DeltaRuleArgs& args);
void delta_rule_backward(Context& ctx, const DeltaRuleBackwardArgs& args);
}  // namespace cuda
namespace reference {
void delta_rule(const DeltaRuleArgs& args);
void delta_rule_backward(const DeltaRuleBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
