#include "model/blocks/attention.h"

#include <algorithm>
#include <cmath>

#include "ops/forgetting_attention.h"
#include "ops/gate.h"
#include "ops/kv_append.h"
#include "ops/linear.h"
#include "ops/log_sigmoid.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/token_shift.h"

namespace deltafox {
namespace {

constexpr float kQkNormEps = 1e-5F;  // whatever norm_eps says

// In place; x [T, H, D].
void norm_heads(Context& ctx, const std::optional<Param>& weight, const TensorView& x) {
  if (!weight) return;
  const TensorView rows = x.reshaped({x.shape[0] * x.shape[1], x.shape[2]});
  ops::rms_norm(ctx, {.x = rows, .w = weight->value, .gate = {}, .y = rows, .eps = kQkNormEps});
}

// max |w| over the weights of head h, of [D] for all heads or [H·D].
float greatest(const ConstTensorView& weight, std::int64_t h, std::int64_t dim) {
  const float* w = weight.f32() + (weight.shape[0] == dim ? 0 : h * dim);
  float max = 0;
  for (std::int64_t i = 0; i < dim; ++i) max = std::max(max, std::abs(w[i]));
  return max;
}

}  // namespace

AttentionMixer::AttentionMixer(const Config& config)
    : config_(config),
      weights_{
          .q_proj = Param::matrix({config.num_heads * config.head_dim, config.hidden_size},
                                  config.projection_init),
          .k_proj = Param::matrix({config.num_kv_heads * config.head_dim, config.hidden_size},
                                  config.projection_init),
          .v_proj = Param::matrix({config.num_kv_heads * config.head_dim, config.hidden_size},
                                  config.projection_init),
          .k_shift_proj = {},
          .v_shift_proj = {},
          .q_norm = {},
          .k_norm = {},
          .fgate_proj = {},
          .fgate_bias = {},
          .ogate_proj = {},
          .output_norm = {},
          .o_proj = Param::matrix({config.hidden_size, config.num_heads * config.head_dim},
                                  config.o_init.value_or(config.projection_init)),
      } {
  const std::int64_t query_dim = config.num_heads * config.head_dim;
  const std::int64_t key_dim = config.num_kv_heads * config.head_dim;
  const auto heads_of_hidden = [&](std::int64_t heads) {
    return Param::matrix({heads, config.hidden_size}, config.projection_init);
  };
  if (config.use_k_shift) weights_.k_shift_proj = heads_of_hidden(config.num_kv_heads);
  if (config.use_v_shift) weights_.v_shift_proj = heads_of_hidden(config.num_kv_heads);
  if (config.qk_norm != QkNorm::kNone) {
    const bool shared = config.qk_norm == QkNorm::kShared;
    weights_.q_norm = Param::vector({shared ? config.head_dim : query_dim}, Init::constant(1));
    weights_.k_norm = Param::vector({shared ? config.head_dim : key_dim}, Init::constant(1));
  }
  if (config.forget_gate == ForgetGate::kProjected) {
    weights_.fgate_proj = heads_of_hidden(config.num_heads);
    weights_.fgate_bias = Param::vector({config.num_heads}, Init::constant(0));
  } else if (config.forget_gate != ForgetGate::kNone) {
    weights_.fgate_bias = Param::vector({config.num_heads}, config.forget_gate_bias_init);
    weights_.fgate_bias->trainable = config.forget_gate == ForgetGate::kBias;
  }
  if (config.use_output_gate) {
    weights_.ogate_proj = Param::matrix({query_dim, config.hidden_size}, config.projection_init);
  }
  if (config.use_output_norm) weights_.output_norm = Param::vector({query_dim}, Init::constant(1));
}

AttentionMixer::State AttentionMixer::new_state() const {
  const bool gated = config_.forget_gate != ForgetGate::kNone;
  State state{.k_shift = {},
              .v_shift = {},
              .cache = KvCache({.kv_heads = config_.num_kv_heads,
                                .head_dim = config_.head_dim,
                                .gate_heads = gated ? config_.num_heads : 0,
                                .key_norms = gated && config_.log_pruning_tolerance &&
                                             config_.qk_norm == QkNorm::kNone,
                                .window = config_.window_size})};
  const Shape row{config_.num_kv_heads, config_.head_dim};
  if (config_.use_k_shift) state.k_shift = Tensor(DType::kF32, row);
  if (config_.use_v_shift) state.v_shift = Tensor(DType::kF32, row);
  return state;
}

StateTensor AttentionMixer::State::pages(Tensor KvPage::*tensor) {
  std::vector<TensorView> parts;
  for (std::int64_t p = cache.first_page(); p < cache.end_page(); ++p) {
    parts.push_back((cache.page(p).*tensor).view());
  }
  return StateTensor(std::move(parts));
}

TensorView AttentionMixer::shifted(Context& ctx, ScratchScope& scratch, const ConstTensorView& x,
                                   const Sequences& sequences, const Param& proj,
                                   const std::optional<Param>& shift_proj,
                                   std::span<State* const> states,
                                   Tensor State::*shift_state) const {
  const std::int64_t tokens = x.shape[0];
  const Shape heads{tokens, config_.num_kv_heads, config_.head_dim};
  const TensorView projected = scratch.tensor({tokens, proj.shape[0]});
  ops::linear(ctx, {.x = x, .w = proj.value, .y = projected});
  if (!shift_proj) return projected.reshaped(heads);
  const TensorView alpha = scratch.tensor({tokens, config_.num_kv_heads});
  ops::linear(ctx, {.x = x, .w = shift_proj->value, .y = alpha});
  ops::activation(ctx, {.activation = Activation::kSigmoid, .x = alpha});
  const TensorView y = scratch.tensor(heads);
  const std::span<float*> pointers = scratch.array<float*>(sequences.count());
  for (std::size_t b = 0; b < states.size(); ++b) pointers[b] = (states[b]->*shift_state).f32();
  ops::token_shift(ctx, {.x = projected.reshaped(heads),
                         .alpha = alpha,
                         .sequences = sequences,
                         .states = pointers,
                         .y = y});
  return y;
}

TensorView AttentionMixer::log_gates(Context& ctx, ScratchScope& scratch,
                                     const ConstTensorView& x) const {
  if (!weights_.fgate_bias) return {};
  const TensorView gates = scratch.tensor({x.shape[0], config_.num_heads});
  if (weights_.fgate_proj) {
    ops::linear(ctx, {.x = x, .w = weights_.fgate_proj->value, .y = gates});
  }
  ops::log_sigmoid(ctx, {.x = weights_.fgate_proj ? gates : TensorView{},
                         .bias = weights_.fgate_bias->value,
                         .y = gates});
  return gates;
}

std::span<const float> AttentionMixer::score_bounds(ScratchScope& scratch) const {
  if (!weights_.q_norm) return {};
  // A normed head is at most √D long before its weights, and turning it changes no length.
  const float root = std::sqrt(static_cast<float>(config_.head_dim));
  const std::int64_t group = config_.num_heads / config_.num_kv_heads;
  const std::span<float> bounds = scratch.array<float>(config_.num_heads);
  for (std::int64_t h = 0; h < config_.num_heads; ++h) {
    bounds[static_cast<std::size_t>(h)] =
        root * greatest(weights_.q_norm->value, h, config_.head_dim) *
        greatest(weights_.k_norm->value, h / group, config_.head_dim);
  }
  return bounds;
}

void AttentionMixer::attend(Context& ctx, const TensorView& q, const TensorView& k,
                            const TensorView& v, const TensorView& gates,
                            const Sequences& sequences, std::span<State* const> states,
                            const TensorView& o) const {
  ScratchScope scratch(ctx);
  const std::span<KvCache*> caches = scratch.array<KvCache*>(sequences.count());
  const std::span<std::int64_t> positions = scratch.array<std::int64_t>(sequences.count());
  for (std::size_t b = 0; b < states.size(); ++b) {
    caches[b] = &states[b]->cache;
    positions[b] = caches[b]->length();
    caches[b]->extend(sequences.length(static_cast<std::int64_t>(b)));
  }
  if (config_.use_rope) {
    ops::rope(ctx, {.q = q,
                    .k = k,
                    .sequences = sequences,
                    .positions = positions,
                    .base = config_.rope_base});
  }
  ops::kv_append(ctx,
                 {.k = k, .v = v, .log_gates = gates, .sequences = sequences, .caches = caches});
  ops::forgetting_attention(ctx, {.q = q,
                                  .sequences = sequences,
                                  .caches = caches,
                                  .log_pruning_tolerance = config_.log_pruning_tolerance,
                                  .score_bounds = score_bounds(scratch),
                                  .o = o});
  for (KvCache* cache : caches) cache->drop_unseen();
}

void AttentionMixer::forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                             std::span<State* const> states, const TensorView& hidden) const {
  const std::int64_t tokens = x.shape[0];
  const std::int64_t heads = config_.num_heads;
  const std::int64_t width = heads * config_.head_dim;
  ScratchScope scratch(ctx);

  const TensorView q = scratch.tensor({tokens, heads, config_.head_dim});  // [T, H, D]
  ops::linear(ctx, {.x = x, .w = weights_.q_proj.value, .y = q.reshaped({tokens, width})});
  const TensorView k = shifted(ctx, scratch, x, sequences, weights_.k_proj, weights_.k_shift_proj,
                               states, &State::k_shift);  // [T, G, D]
  const TensorView v = shifted(ctx, scratch, x, sequences, weights_.v_proj, weights_.v_shift_proj,
                               states, &State::v_shift);  // [T, G, D]
  norm_heads(ctx, weights_.q_norm, q);
  norm_heads(ctx, weights_.k_norm, k);

  const TensorView o = scratch.tensor(q.shape);  // [T, H, D]
  attend(ctx, q, k, v, log_gates(ctx, scratch, x), sequences, states, o);

  TensorView gate;  // [T, H·D]
  if (weights_.ogate_proj) {
    gate = scratch.tensor({tokens, width});
    ops::linear(ctx, {.x = x, .w = weights_.ogate_proj->value, .y = gate});
  }
  const TensorView output = o.reshaped({tokens, width});
  if (weights_.output_norm) {
    const Shape rows{tokens * heads, config_.head_dim};
    ops::rms_norm(ctx, {.x = o.reshaped(rows),
                        .w = weights_.output_norm->value,
                        .gate = weights_.ogate_proj ? gate.reshaped(rows) : TensorView{},
                        .gate_activation = config_.output_gate_activation,
                        .y = o.reshaped(rows),
                        .eps = config_.norm_eps});
  } else if (weights_.ogate_proj) {
    ops::gate(ctx, {.activation = config_.output_gate_activation, .gate = gate, .x = output});
  }
  ops::linear(ctx, {.x = output, .w = weights_.o_proj.value, .y = hidden, .accumulate = true});
}

}  // namespace deltafox
