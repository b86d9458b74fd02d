// One token of each of a few sequences through all that an attention mixer does between its
// products, on a GPU:
//   k ← α_k k₋ + (1 − α_k) k, likewise v        (k₋: the last token's, which the states hold)
//   q ← rope(norm(q)), k ← rope(norm(k))
//   log f = log σ(gate + bias)
//   the caches go on by k, v and log f           (ops/kv_append.h)
//   o = act(g) · norm(attention(q))              (ops/forgetting_attention.h)
// Every part but the cache and the attention may be absent. Sums do not depend on B.
#pragma once

#include <optional>
#include <span>

#include "core/context.h"
#include "ops/activation.h"
#include "ops/kv_cache.h"

namespace deltafox {

struct AttentionStepArgs {
  ConstTensorView q;             // [B, H, D] F32, D 64 or 128
  ConstTensorView k;             // [B, G, D] F32
  ConstTensorView v;             // [B, G, D] F32
  ConstTensorView k_alpha = {};  // [B, G] F32; no data without a shift
  ConstTensorView v_alpha = {};
  std::span<float* const> k_shift_states = {};  // [B], each [G, D]
  std::span<float* const> v_shift_states = {};
  ConstTensorView q_norm = {};  // [D] or [H·D]; no data without norms
  ConstTensorView k_norm = {};  // [D] or [G·D]
  float qk_norm_eps = 0;
  std::optional<float> rope_base = {};
  ConstTensorView gates = {};      // [B, H] F32 logits; no data where the bias is all
  ConstTensorView gate_bias = {};  // [H]; no data without gates
  // Of one layout with BF16 keys and without norms of keys; KvCache::extend has made room for the
  // token.
  std::span<KvCache* const> caches;  // [B]
  std::optional<float> log_pruning_tolerance = {};
  std::span<const float> score_bounds = {};  // [H], with a tolerance
  ConstTensorView output_norm = {};          // [H·D]; no data for none
  float output_norm_eps = 0;
  ConstTensorView output_gate = {};  // [B, H·D] F32; no data for none
  Activation output_gate_activation = Activation::kSigmoid;
  TensorView o;  // [B, H·D] BF16
};

namespace ops {
void attention_step(Context& ctx, const AttentionStepArgs& args);
}
namespace cuda {
void attention_step(Context& ctx, const AttentionStepArgs& args);
}
}  // namespace deltafox
