// Causal softmax attention with forget gates (Lin et al., "Forgetting Transformer: Softmax
// Attention with a Forget Gate", 2025), per head:
//   s_ij = q_i·k_j / √D + Σ_{l=j+1..i} log f_l,  o_i = Σ_{j<=i} softmax_j(s_ij) v_j
// A query of the last position of a sequence sees the whole cache, or with a window its last
// positions. Query head h reads the keys and values of head h / (H / G).
//
// With a pruning tolerance, a query skips the pages of keys whose gates alone keep each weight
// below e^tolerance / (number of keys) (Lin et al., "Adaptive Computation Pruning for the
// Forgetting Transformer", 2025): pages where the gates' sum is below
//   δ_i = tolerance − 2 U_i − ln(i + 1),  U_i a bound of |q_i·k_j| / √D.
// So the weights that it skips total at most e^tolerance.
//
// cpu::forgetting_attention makes no [T, T] matrix: it passes by the keys page by page, with a
// running maximum and sum. What a query gets depends on its position and the cache alone: not on
// the queries beside it, on how the sequence was split into calls, or on the number of threads.
#pragma once

#include <optional>
#include <span>

#include "core/context.h"
#include "core/sequences.h"
#include "ops/kv_cache.h"

namespace deltafox {

struct ForgettingAttentionArgs {
  ConstTensorView q;  // [T, H, D]
  Sequences sequences;
  std::span<const KvCache* const> caches;  // [B], this call's tokens appended
  std::optional<float> log_pruning_tolerance = {};
  // [H] the bound of |q·k| / √D of each head. No data: the norm of the query times the greatest
  // norm of the keys so far, which the caches must keep.
  std::span<const float> score_bounds = {};
  // The CPU may round q, k, v and the softmax's weights to bfloat16 where it has tiles for such
  // products; sums, scores and the softmax are float32 in any case.
  bool bf16_products = false;
  TensorView o;         // [T, H, D]
  TensorView lse = {};  // [T, H] F32, ln Σ_j e^s_ij for the backward; or no data
};

// Of whole sequences from position 0. With P the weights and dP_ij = do_i·v_j:
//   dS_ij = P_ij (dP_ij − Σ_j P_ij dP_ij),  dq_i = Σ_j dS_ij k_j / √D,  dk_j = Σ_i dS_ij q_i / √D,
//   dv_j = Σ_i P_ij do_i,  d log f_l = Σ_{i>=l} Σ_{j<l} dS_ij
// Skips the pages that the forward skips (which a query skips is not differentiated).
struct ForgettingAttentionBackwardArgs {
  ConstTensorView q;               // [T, H, D]
  ConstTensorView k;               // [T, G, D]
  ConstTensorView v;               // [T, G, D]
  ConstTensorView log_gates = {};  // [T, H] or no data
  Sequences sequences;
  std::optional<std::int64_t> window = {};  // positions a query sees, its own included
  std::optional<float> log_pruning_tolerance = {};
  std::span<const float> score_bounds = {};  // [H] or empty, as in the forward
  ConstTensorView o;                         // [T, H, D], the forward's
  ConstTensorView lse = {};                  // [T, H] F32, the forward's; on the CPU or no data
  ConstTensorView d_o;                       // [T, H, D]
  TensorView dq;                             // [T, H, D], =
  TensorView dk;                             // [T, G, D], =
  TensorView dv;                             // [T, G, D], =
  TensorView dlog_gates = {};                // [T, H], =; with gates
};

namespace ops {
void forgetting_attention(Context& ctx, const ForgettingAttentionArgs& args);
void forgetting_attention_backward(Context& ctx, const ForgettingAttentionBackwardArgs& args);
}  // namespace ops
namespace cpu {
void forgetting_attention(Context& ctx, const ForgettingAttentionArgs& args);
void forgetting_attention_backward(Context& ctx, const ForgettingAttentionBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void forgetting_attention(Context& ctx, const ForgettingAttentionArgs& args);
// Head sizes of at most 128; all activations of one dtype.
void forgetting_attention_backward(Context& ctx, const ForgettingAttentionBackwardArgs& args);
}  // namespace cuda
namespace reference {
// Prunes nothing.
void forgetting_attention(const ForgettingAttentionArgs& args);
void forgetting_attention_backward(const ForgettingAttentionBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
