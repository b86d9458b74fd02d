// The DeltaNet mixer between its products, for GPUs: what is bound by memory there, in one pass.
//
// delta_inputs: what the delta rule reads,
//   [q | k | v] = silu(short_conv(projected)) with W = 4 (ops/short_conv.h),
//   β = σ(β), or σ(x b_projᵀ) where x is given,
//   then q and k of each head at length one: x · rsqrt(Σx² + 1e-6).
// delta_inputs_backward: the gradients of all that, given those of q, k, v and β.
// delta_token: one token of each sequence through all of it: delta_inputs, delta_rule
//   (ops/delta_rule.h), rms_norm of each head; heads of kDeltaTokenHead.
// The states of the convolutions, and in delta_token the delta rule's, are updated. What a sequence
// gets does not depend on the others.
#pragma once

#include <span>

#include "core/context.h"
#include "core/sequences.h"

namespace deltafox {

constexpr std::int64_t kDeltaConvWidth = 4;    // W
constexpr std::int64_t kDeltaTokenHead = 128;  // K and V of delta_token
constexpr std::int64_t kDeltaInputsHeads = 16;

struct DeltaConvolutions {
  ConstTensorView q, k, v;                              // weights, each [H·K, W]
  std::span<float*const> q_states, k_states, v_states;  // [B], each [H·K, W]
};

struct DeltaInputsArgs {
  ConstTensorView projected;  // [T, 3·H·K]: q, k, v before the convolutions
  DeltaConvolutions convolutions;
  Sequences sequences;
  ConstTensorView x = {};       // [T, C] BF16, C a multiple of 8, with
  ConstTensorView b_proj = {};  // [H, C] BF16, H at most kDeltaInputsHeads; or no data
  TensorView beta;              // [T, H] F32, in place without x
  TensorView q;                 // [T, H, K], K a power of two from 8 to 256
  TensorView k;                 // [T, H, K]
  TensorView v;                 // [T, H, K]
};

// Of whole sequences, which begin from a zero state. N is 3·H·K + H or more.
struct DeltaInputsBackwardArgs {
  ConstTensorView projected;    // [T, 3·H·K] as delta_inputs read it
  ConstTensorView beta_logits;  // [T, H] F32, what β was before the sigmoid
  ConstTensorView q, k, v;      // weights of the convolutions, each [H·K, W]
  Sequences sequences;
  ConstTensorView dq, dk, dv;  // [T, H, K]
  ConstTensorView dbeta;       // [T, H] F32
  // [T, N], =: of `projected`, then of beta_logits, rounded likewise, then zeros
  TensorView d_projected;
  TensorView dq_conv, dk_conv, dv_conv;  // of the weights, +=
};

struct DeltaTokenArgs {
  ConstTensorView x;          // [B, C], C a multiple of 8
  ConstTensorView b_proj;     // [H, C], of the same dtype: β = σ(x b_projᵀ)
  ConstTensorView projected;  // [B, 3·H·K]
  DeltaConvolutions convolutions;
  std::span<float* const> states;  // [B], each [H, K, V]
  ConstTensorView norm;            // [V]
  float norm_eps = 0;
  TensorView o;  // [B, H·V]
};

namespace ops {
void check_delta_inputs(const Context& ctx, const DeltaInputsArgs& args);
void delta_inputs(Context& ctx, const DeltaInputsArgs& args);
void delta_inputs_backward(Context& ctx, const DeltaInputsBackwardArgs& args);
void delta_token(Context& ctx, const DeltaTokenArgs& args);
}  // namespace ops
namespace cuda {
void delta_inputs(Context& ctx, const DeltaInputsArgs& args);
void delta_inputs_backward(Context& ctx, const DeltaInputsBackwardArgs& args);
void delta_token(Context& ctx, const DeltaTokenArgs& args);
}  // namespace cuda
}  // namespace deltafox
