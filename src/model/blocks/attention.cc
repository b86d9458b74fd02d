#include "model/blocks/attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "model/blocks/projection.h"
#include "ops/activation.h"
#include "ops/attention_step.h"
#include "ops/forgetting_attention.h"
#include "ops/gate.h"
#include "ops/kv_append.h"
#include "ops/linear.h"
#include "ops/log_sigmoid.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/step.h"
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
    weights_.q_norm->read_on_host = config.log_pruning_tolerance.has_value();
    weights_.k_norm->read_on_host = config.log_pruning_tolerance.has_value();
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

AttentionMixer::State AttentionMixer::new_state(Device device, DType activation_dtype) const {
  const bool gated = config_.forget_gate != ForgetGate::kNone;
  State state{.k_shift = {},
              .v_shift = {},
              .cache = KvCache({.kv_heads = config_.num_kv_heads,
                                .head_dim = config_.head_dim,
                                .gate_heads = gated ? config_.num_heads : 0,
                                .key_norms = gated && config_.log_pruning_tolerance &&
                                             config_.qk_norm == QkNorm::kNone,
                                .window = config_.window_size,
                                .device = device,
                                .dtype = activation_dtype})};
  const Shape row{config_.num_kv_heads, config_.head_dim};
  if (config_.use_k_shift) state.k_shift = Tensor(DType::kF32, row, device);
  if (config_.use_v_shift) state.v_shift = Tensor(DType::kF32, row, device);
  return state;
}

StateTensor AttentionMixer::State::pages(Tensor KvPage::*tensor) {
  std::vector<TensorView> parts;
  for (std::int64_t p = cache.first_page(); p < cache.end_page(); ++p) {
    Tensor& part = cache.page(p).*tensor;
    if (part.bytes() > 0) parts.push_back(part.view());
  }
  return StateTensor(std::move(parts));
}

TensorView AttentionMixer::shifted(Context& ctx, ScratchScope& scratch, const ConstTensorView& x,
                                   const Sequences& sequences, const Param& proj,
                                   const std::optional<Param>& shift_proj,
                                   std::span<State* const> states, Tensor State::*shift_state,
                                   Saved::Shifted* before) const {
  const std::int64_t tokens = x.shape[0];
  const Shape heads{tokens, config_.num_kv_heads, config_.head_dim};
  const TensorView projected = scratch.activation({tokens, proj.shape[0]});
  ops::linear(ctx, {.x = x, .w = proj.value, .y = projected});
  if (before != nullptr) before->projected = projected.reshaped(heads);
  if (!shift_proj) return projected.reshaped(heads);
  const TensorView alpha = scratch.tensor({tokens, config_.num_kv_heads});
  ops::linear(ctx, {.x = x, .w = shift_proj->value, .y = alpha});
  if (before != nullptr) {
    before->alpha_logits = copy_of(ctx, scratch, alpha);
    before->alpha = alpha;
  }
  ops::activation(ctx, {.activation = Activation::kSigmoid, .x = alpha});
  const TensorView y = scratch.activation(heads);
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
  if (!weights_.q_norm || !config_.log_pruning_tolerance) return {};
  // A normed head is at most √D long before its weights, and turning it changes no length.
  const float root = std::sqrt(static_cast<float>(config_.head_dim));
  const std::int64_t group = config_.num_heads / config_.num_kv_heads;
  const std::span<float> bounds = scratch.array<float>(config_.num_heads);
  for (std::int64_t h = 0; h < config_.num_heads; ++h) {
    bounds[static_cast<std::size_t>(h)] =
        root * greatest(weights_.q_norm->on_host(), h, config_.head_dim) *
        greatest(weights_.k_norm->on_host(), h / group, config_.head_dim);
  }
  return bounds;
}

std::span<KvCache*> AttentionMixer::extended(ScratchScope& scratch, const Sequences& sequences,
                                             std::span<State* const> states,
                                             std::span<std::int64_t> positions) {
  const std::span<KvCache*> caches = scratch.array<KvCache*>(sequences.count());
  for (std::size_t b = 0; b < states.size(); ++b) {
    caches[b] = &states[b]->cache;
    positions[b] = caches[b]->length();
    caches[b]->extend(sequences.length(static_cast<std::int64_t>(b)));
  }
  return caches;
}

void AttentionMixer::drop_unseen(const Context& ctx, std::span<KvCache* const> caches) {
  if (ctx.recorded_runs() != nullptr) return;  // the first run sees what this recording sees
  for (KvCache* cache : caches) cache->drop_unseen();
}

void AttentionMixer::attend(Context& ctx, const TensorView& q, const TensorView& k,
                            const TensorView& v, const TensorView& gates,
                            const Sequences& sequences, std::span<State* const> states,
                            const TensorView& o, const TensorView& lse) const {
  ScratchScope scratch(ctx);
  const std::span<std::int64_t> positions = scratch.array<std::int64_t>(sequences.count());
  const std::span<KvCache*> caches = extended(scratch, sequences, states, positions);
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
                                  .bf16_products = weights_.q_proj.value.dtype != DType::kF32,
                                  .o = o,
                                  .lse = lse});
  drop_unseen(ctx, caches);
}

TensorView AttentionMixer::output(Context& ctx, ScratchScope& scratch, const Saved& saved) const {
  const TensorView& o = saved.o;
  const Shape flat{o.shape[0], o.shape[1] * o.shape[2]};
  if (weights_.output_norm) {
    const TensorView y = scratch.like(o);
    const Shape rows{o.shape[0] * o.shape[1], o.shape[2]};
    ops::rms_norm(ctx, {.x = o.reshaped(rows),
                        .w = weights_.output_norm->value,
                        .gate = weights_.ogate_proj ? saved.gate.reshaped(rows) : TensorView{},
                        .gate_activation = config_.output_gate_activation,
                        .y = y.reshaped(rows),
                        .eps = config_.norm_eps});
    return y.reshaped(flat);
  }
  if (!weights_.ogate_proj) return o.reshaped(flat);
  const TensorView y = copy_of(ctx, scratch, o.reshaped(flat));
  ops::gate(ctx, {.activation = config_.output_gate_activation, .gate = saved.gate, .x = y});
  return y;
}

void AttentionMixer::forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                             std::span<State* const> states, const TensorView& hidden,
                             Saved* saved) const {
  const std::int64_t tokens = x.shape[0];
  const std::int64_t heads = config_.num_heads;
  const std::int64_t width = heads * config_.head_dim;
  ScratchScope scratch(ctx, saved != nullptr);
  Saved kept;
  // What an op in place is about to overwrite.
  const auto keep = [&](const TensorView& tensor) {
    return saved != nullptr ? copy_of(ctx, scratch, tensor) : tensor;
  };

  const TensorView q = scratch.activation({tokens, heads, config_.head_dim});  // [T, H, D]
  ops::linear(ctx, {.x = x, .w = weights_.q_proj.value, .y = q.reshaped({tokens, width})});
  const TensorView k =
      shifted(ctx, scratch, x, sequences, weights_.k_proj, weights_.k_shift_proj, states,
              &State::k_shift, saved != nullptr ? &kept.k_before : nullptr);  // [T, G, D]
  const TensorView v =
      shifted(ctx, scratch, x, sequences, weights_.v_proj, weights_.v_shift_proj, states,
              &State::v_shift, saved != nullptr ? &kept.v_before : nullptr);  // [T, G, D]
  if (weights_.q_norm) {
    kept.q_unnormed = keep(q);
    kept.k_before.unnormed = keep(k);
  }
  norm_heads(ctx, weights_.q_norm, q);
  norm_heads(ctx, weights_.k_norm, k);

  const TensorView o = scratch.activation(q.shape);  // [T, H, D]
  const TensorView gates = log_gates(ctx, scratch, x);
  // The CPU's backward finds it again.
  const bool keeps_lse = saved != nullptr && ctx.device() == Device::kCuda;
  if (keeps_lse) kept.lse = scratch.tensor({tokens, heads});
  attend(ctx, q, k, v, gates, sequences, states, o, kept.lse);

  TensorView gate;  // [T, H·D]
  if (weights_.ogate_proj) {
    gate = scratch.activation({tokens, width});
    ops::linear(ctx, {.x = x, .w = weights_.ogate_proj->value, .y = gate});
  }
  kept.o = o;
  kept.gate = gate;
  ScratchScope output_scratch(ctx);
  add_output(ctx, output(ctx, output_scratch, kept), weights_.o_proj, {}, hidden);
  if (saved == nullptr) return;
  kept.q = q;
  kept.k = k;
  kept.v = v;
  kept.log_gates = gates;
  *saved = kept;
}

bool AttentionMixer::has_step() const {
  const std::int64_t width = config_.num_heads * config_.head_dim;
  const bool key_norms = config_.forget_gate != ForgetGate::kNone &&
                         config_.log_pruning_tolerance && config_.qk_norm == QkNorm::kNone;
  return (config_.head_dim == 64 || config_.head_dim == 128) && !key_norms &&
         config_.hidden_size % 256 == 0 && width % 256 == 0 &&
         weights_.q_proj.value.dtype != DType::kF32;
}

void AttentionMixer::step(Context& ctx, const ConstTensorView& norm, float eps,
                          std::span<State* const> states, const TensorView& hidden) const {
  const std::int64_t batch = hidden.shape[0];
  const std::int64_t heads = config_.num_heads;
  const std::int64_t keys = config_.num_kv_heads;
  const std::int64_t dim = config_.head_dim;
  ScratchScope scratch(ctx);
  const std::span<StepLinearPart> parts = scratch.array<StepLinearPart>(kStepLinearParts);
  std::size_t count = 0;
  // A product of the normed stream [B, N]; no data without its weight.
  const auto projected = [&](const std::optional<Param>& w,
                             StepEpilogue epilogue = StepEpilogue::kStore) -> TensorView {
    if (!w) return {};
    const TensorView y = scratch.tensor({batch, w->shape[0]});
    parts[count++] = {.w = w->value, .y = y, .epilogue = epilogue};
    return y;
  };
  const auto shift_states = [&](Tensor State::*state) {
    return (states[0]->*state).bytes() > 0 ? state_pointers(scratch, states, state)
                                           : std::span<float*>{};
  };
  const TensorView q = projected(weights_.q_proj);
  const TensorView k = projected(weights_.k_proj);
  const TensorView v = projected(weights_.v_proj);
  const TensorView k_alpha = projected(weights_.k_shift_proj, StepEpilogue::kSigmoid);
  const TensorView v_alpha = projected(weights_.v_shift_proj, StepEpilogue::kSigmoid);
  const TensorView gates = projected(weights_.fgate_proj);
  ops::step_linear(ctx, {.x = hidden, .norm = norm, .norm_eps = eps, .parts = parts.first(count)});
  count = 0;
  const TensorView output_gate = projected(weights_.ogate_proj);
  if (count > 0) {
    ops::step_linear(ctx,
                     {.x = hidden, .norm = norm, .norm_eps = eps, .parts = parts.first(count)});
  }

  const std::span<std::int64_t> cu_seqlens = scratch.array<std::int64_t>(batch + 1);
  std::iota(cu_seqlens.begin(), cu_seqlens.end(), 0);
  const std::span<KvCache*> caches =
      extended(scratch, Sequences(cu_seqlens), states, scratch.array<std::int64_t>(batch));
  const TensorView o = scratch.activation({batch, heads * dim});
  ops::attention_step(
      ctx, {.q = q.reshaped({batch, heads, dim}),
            .k = k.reshaped({batch, keys, dim}),
            .v = v.reshaped({batch, keys, dim}),
            .k_alpha = k_alpha,
            .v_alpha = v_alpha,
            .k_shift_states = shift_states(&State::k_shift),
            .v_shift_states = shift_states(&State::v_shift),
            .q_norm = value_of(weights_.q_norm),
            .k_norm = value_of(weights_.k_norm),
            .qk_norm_eps = kQkNormEps,
            .rope_base = config_.use_rope ? std::optional(config_.rope_base) : std::nullopt,
            .gates = gates,
            .gate_bias = value_of(weights_.fgate_bias),
            .caches = caches,
            .log_pruning_tolerance = config_.log_pruning_tolerance,
            .score_bounds = score_bounds(scratch),
            .output_norm = value_of(weights_.output_norm),
            .output_norm_eps = config_.norm_eps,
            .output_gate = output_gate,
            .output_gate_activation = config_.output_gate_activation,
            .o = o});
  drop_unseen(ctx, caches);
  const StepLinearPart output{
      .w = weights_.o_proj.value, .y = hidden, .epilogue = StepEpilogue::kAdd};
  ops::step_linear(ctx, {.x = o, .parts = {&output, 1}});
}

void AttentionMixer::output_backward(Context& ctx, const Saved& saved, const TensorView& dy,
                                     const TensorView& d_o, const TensorView& dgate,
                                     Gradients& gradients) const {
  ScratchScope scratch(ctx);
  const TensorView gated = output(ctx, scratch, saved);  // [T, H·D]
  const Shape& flat = gated.shape;
  ops::linear_backward(ctx, {.dy = dy,
                             .x = gated,
                             .w = weights_.o_proj.value,
                             .dx = d_o.reshaped(flat),
                             .dw = gradients.sum_of(weights_.o_proj)});
  if (weights_.output_norm) {
    const Shape rows{d_o.shape[0] * d_o.shape[1], d_o.shape[2]};
    ops::rms_norm_backward(ctx,
                           {.x = saved.o.reshaped(rows),
                            .w = weights_.output_norm->value,
                            .gate = weights_.ogate_proj ? saved.gate.reshaped(rows) : TensorView{},
                            .gate_activation = config_.output_gate_activation,
                            .eps = config_.norm_eps,
                            .dy = d_o.reshaped(rows),
                            .dx = d_o.reshaped(rows),
                            .dw = gradients.of(weights_.output_norm),
                            .dgate = weights_.ogate_proj ? dgate.reshaped(rows) : TensorView{}});
  } else if (weights_.ogate_proj) {
    ops::gate_backward(ctx, {.activation = config_.output_gate_activation,
                             .gate = saved.gate,
                             .x = saved.o.reshaped(flat),
                             .dy = d_o.reshaped(flat),
                             .dx = d_o.reshaped(flat),
                             .dgate = dgate});
  }
}

void AttentionMixer::attend_backward(Context& ctx, const Sequences& sequences, const Saved& saved,
                                     const TensorView& d_o, const TensorView& dq,
                                     const TensorView& dk, const TensorView& dv,
                                     const TensorView& dgates, Gradients& gradients) const {
  ScratchScope scratch(ctx);
  ops::forgetting_attention_backward(ctx, {.q = saved.q,
                                           .k = saved.k,
                                           .v = saved.v,
                                           .log_gates = saved.log_gates,
                                           .sequences = sequences,
                                           .window = config_.window_size,
                                           .log_pruning_tolerance = config_.log_pruning_tolerance,
                                           .score_bounds = score_bounds(scratch),
                                           .o = saved.o,
                                           .lse = saved.lse,
                                           .d_o = d_o,
                                           .dq = dq,
                                           .dk = dk,
                                           .dv = dv,
                                           .dlog_gates = dgates});
  if (config_.use_rope) {
    const std::span<std::int64_t> positions = scratch.array<std::int64_t>(sequences.count());
    std::fill(positions.begin(), positions.end(), 0);
    ops::rope_backward(ctx, {.dq = dq,
                             .dk = dk,
                             .sequences = sequences,
                             .positions = positions,
                             .base = config_.rope_base});
  }
  const auto through_norm = [&](const std::optional<Param>& weight, const TensorView& unnormed,
                                const TensorView& d) {
    if (!weight) return;
    const Shape rows{d.shape[0] * d.shape[1], d.shape[2]};
    ops::rms_norm_backward(ctx, {.x = unnormed.reshaped(rows),
                                 .w = weight->value,
                                 .eps = kQkNormEps,
                                 .dy = d.reshaped(rows),
                                 .dx = d.reshaped(rows),
                                 .dw = gradients.of(weight)});
  };
  through_norm(weights_.q_norm, saved.q_unnormed, dq);
  through_norm(weights_.k_norm, saved.k_before.unnormed, dk);
}

void AttentionMixer::shifted_backward(Context& ctx, const ConstTensorView& x,
                                      const Sequences& sequences, const Param& proj,
                                      const std::optional<Param>& shift_proj,
                                      const Saved::Shifted& before, const TensorView& d,
                                      const TensorView& dx, Gradients& gradients) const {
  ScratchScope scratch(ctx);
  TensorView dprojected = d;  // [T, G, D]
  if (shift_proj) {
    dprojected = scratch.like(d);
    const TensorView dalpha = scratch.like(before.alpha);  // [T, G]
    ops::token_shift_backward(ctx, {.x = before.projected,
                                    .alpha = before.alpha,
                                    .sequences = sequences,
                                    .dy = d,
                                    .dx = dprojected,
                                    .dalpha = dalpha});
    ops::activation_backward(
        ctx,
        {.activation = Activation::kSigmoid, .x = before.alpha_logits, .dy = dalpha, .dx = dalpha});
    ops::linear_backward(ctx, {.dy = dalpha,
                               .x = x,
                               .w = shift_proj->value,
                               .dx = dx,
                               .accumulate_dx = true,
                               .dw = gradients.sum_of(shift_proj)});
  }
  ops::linear_backward(ctx, {.dy = dprojected.reshaped({x.shape[0], proj.shape[0]}),
                             .x = x,
                             .w = proj.value,
                             .dx = dx,
                             .accumulate_dx = true,
                             .dw = gradients.sum_of(proj)});
}

void AttentionMixer::backward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                              const Saved& saved, const TensorView& dy, const TensorView& dx,
                              Gradients& gradients) const {
  ScratchScope scratch(ctx);
  const TensorView d_o = scratch.like(saved.o);  // [T, H, D]
  const TensorView dq = scratch.like(saved.q);   // [T, H, D]
  const TensorView dk = scratch.like(saved.k);   // [T, G, D]
  const TensorView dv = scratch.like(saved.v);   // [T, G, D]
  const TensorView dgates =
      weights_.fgate_bias ? scratch.like(saved.log_gates) : TensorView{};  // [T, H]
  const TensorView dgate =
      weights_.ogate_proj ? scratch.like(saved.gate) : TensorView{};  // [T, H·D]
  output_backward(ctx, saved, dy, d_o, dgate, gradients);
  attend_backward(ctx, sequences, saved, d_o, dq, dk, dv, dgates, gradients);
  const auto through_projection = [&](const Param& proj, const TensorView& d, bool first = false) {
    ops::linear_backward(ctx, {.dy = d.reshaped({x.shape[0], proj.shape[0]}),
                               .x = x,
                               .w = proj.value,
                               .dx = dx,
                               .accumulate_dx = !first,
                               .dw = gradients.sum_of(proj)});
  };
  through_projection(weights_.q_proj, dq, true);
  shifted_backward(ctx, x, sequences, weights_.k_proj, weights_.k_shift_proj, saved.k_before, dk,
                   dx, gradients);
  shifted_backward(ctx, x, sequences, weights_.v_proj, weights_.v_shift_proj, saved.v_before, dv,
                   dx, gradients);
  if (weights_.ogate_proj) through_projection(*weights_.ogate_proj, dgate);
  if (!weights_.fgate_bias) return;
  ops::log_sigmoid_backward(ctx, {.y = saved.log_gates,
                                  .dy = dgates,
                                  .dx = weights_.fgate_proj ? dgates : TensorView{},
                                  .dbias = gradients.of(weights_.fgate_bias)});
  if (weights_.fgate_proj) through_projection(*weights_.fgate_proj, dgates);
}

}  // namespace deltafox
