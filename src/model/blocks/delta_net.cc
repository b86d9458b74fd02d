#include "model/blocks/delta_net.h"

#include <array>
#include <bit>

#include "model/blocks/projection.h"
#include "ops/delta_mixer.h"
#include "ops/delta_rule.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/step.h"

namespace deltafox {

DeltaNetMixer::DeltaNetMixer(const Config& config)
    : config_(config),
      weights_{
          .norm = {},
          .q_proj = xavier_projection(config.key_dim, config.hidden_size),
          .k_proj = xavier_projection(config.key_dim, config.hidden_size),
          .v_proj = xavier_projection(config.value_dim, config.hidden_size),
          .b_proj = {},
          .q_conv1d = {},
          .k_conv1d = {},
          .v_conv1d = {},
          .g_proj = {},
          .o_norm = Param::vector({config.value_dim / config.num_heads}, Init::constant(1)),
          .o_proj = xavier_projection(config.hidden_size, config.value_dim),
      } {
  if (config.norm_first) weights_.norm = Param::vector({config.hidden_size}, Init::constant(1));
  if (config.use_beta) weights_.b_proj = xavier_projection(config.num_heads, config.hidden_size);
  if (config.use_gate) weights_.g_proj = xavier_projection(config.value_dim, config.hidden_size);
  if (config.use_short_conv) {
    weights_.q_conv1d = depthwise_convolution(config.key_dim, config.conv_size);
    weights_.k_conv1d = depthwise_convolution(config.key_dim, config.conv_size);
    weights_.v_conv1d = depthwise_convolution(config.value_dim, config.conv_size);
  }
}

DeltaNetMixer::State DeltaNetMixer::new_state(Device device, DType /*activation_dtype*/) const {
  State state;
  if (config_.use_short_conv) {
    state.q_conv = Tensor(DType::kF32, {config_.key_dim, config_.conv_size}, device);
    state.k_conv = Tensor(DType::kF32, {config_.key_dim, config_.conv_size}, device);
    state.v_conv = Tensor(DType::kF32, {config_.value_dim, config_.conv_size}, device);
  }
  state.recurrent = Tensor(DType::kF32,
                           {config_.num_heads, config_.key_dim / config_.num_heads,
                            config_.value_dim / config_.num_heads},
                           device);
  return state;
}

void DeltaNetMixer::forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                            std::span<State* const> states, const TensorView& hidden,
                            Saved* saved) const {
  const std::int64_t tokens = x.shape[0];
  const std::int64_t heads = config_.num_heads;
  const Shape keys{tokens, heads, config_.key_dim / heads};
  const Shape values{tokens, heads, config_.value_dim / heads};
  ScratchScope scratch(ctx, saved != nullptr);
  Saved kept;
  // What an op in place is about to overwrite.
  const auto keep = [&](const TensorView& tensor) {
    return saved != nullptr ? copy_of(ctx, scratch, tensor) : tensor;
  };

  ConstTensorView input = x;  // [T, C]
  if (weights_.norm) {
    const TensorView normed = scratch.activation(x.shape);
    ops::rms_norm(ctx, {.x = x, .w = weights_.norm->value, .y = normed, .eps = config_.norm_eps});
    input = normed;
  }
  if (saved == nullptr && has_fused(ctx)) {
    const TensorView output = fused(ctx, scratch, input, sequences, states);
    ops::linear(ctx, {.x = output, .w = weights_.o_proj.value, .y = hidden, .accumulate = true});
    return;
  }

  const auto projected = [&](const Param& proj, const std::optional<Param>& conv,
                             Tensor State::*conv_state, Activation activation, TensorView& before) {
    return project_and_convolve(ctx, scratch, input, proj, conv, sequences,
                                state_pointers(scratch, states, conv_state), activation,
                                saved != nullptr ? &before : nullptr);
  };
  const TensorView q = projected(weights_.q_proj, weights_.q_conv1d, &State::q_conv,
                                 qk_conv_activation(), kept.q_projected)
                           .reshaped(keys);  // [T, H, K]
  const TensorView k = projected(weights_.k_proj, weights_.k_conv1d, &State::k_conv,
                                 qk_conv_activation(), kept.k_projected)
                           .reshaped(keys);  // [T, H, K]
  const TensorView v = projected(weights_.v_proj, weights_.v_conv1d, &State::v_conv,
                                 Activation::kSilu, kept.v_projected)
                           .reshaped(values);  // [T, H, V]
  kept.q_convolved = keep(q);
  kept.k_convolved = keep(k);
  ops::feature_map(ctx, {.activation = head_activation(), .norm = config_.qk_norm, .x = q});
  ops::feature_map(ctx, {.activation = head_activation(), .norm = config_.qk_norm, .x = k});

  TensorView beta;  // [T, H]
  if (weights_.b_proj) {
    beta = scratch.tensor({tokens, heads});
    ops::linear(ctx, {.x = input, .w = weights_.b_proj->value, .y = beta});
    kept.beta_logits = keep(beta);
    ops::activation(ctx, {.activation = Activation::kSigmoid, .x = beta});
  }

  const TensorView o = scratch.activation(values);  // [T, H, V]
  ops::delta_rule(ctx, {.q = q,
                        .k = k,
                        .v = v,
                        .beta = beta,
                        .sequences = sequences,
                        .states = state_pointers(scratch, states, &State::recurrent),
                        .o = o});

  TensorView gate;  // [T, H·V]
  if (weights_.g_proj) {
    gate = scratch.activation({tokens, config_.value_dim});
    ops::linear(ctx, {.x = input, .w = weights_.g_proj->value, .y = gate});
  }
  const Shape rows{tokens * heads, values[2]};
  const TensorView output = saved != nullptr ? scratch.activation(o.shape) : o;
  ops::rms_norm(ctx, {.x = o.reshaped(rows),
                      .w = weights_.o_norm.value,
                      .gate = weights_.g_proj ? gate.reshaped(rows) : TensorView{},
                      .gate_activation = Activation::kSilu,
                      .y = output.reshaped(rows),
                      .eps = config_.norm_eps});
  const TensorView output_rows = output.reshaped({tokens, config_.value_dim});
  ops::linear(ctx, {.x = output_rows, .w = weights_.o_proj.value, .y = hidden, .accumulate = true});
  if (saved == nullptr) return;
  kept.input = input;
  kept.q = q;
  kept.k = k;
  kept.v = v;
  kept.beta = beta;
  kept.o = o;
  kept.gate = gate;
  kept.output = output_rows;
  *saved = kept;
}

bool DeltaNetMixer::has_fused(const Context& ctx) const {
  const auto keys = static_cast<std::uint64_t>(config_.key_dim / config_.num_heads);
  return ctx.device() == Device::kCuda && weights_.q_conv1d && weights_.b_proj &&
         config_.conv_size == kDeltaConvWidth && config_.qk_activation == Activation::kSilu &&
         config_.qk_norm == FeatureNorm::kL2 && config_.key_dim == config_.value_dim && keys >= 8 &&
         keys <= 256 && std::has_single_bit(keys) &&
         joined({&weights_.q_proj, &weights_.k_proj, &weights_.v_proj}).data != nullptr;
}

TensorView DeltaNetMixer::fused(Context& ctx, ScratchScope& scratch, const ConstTensorView& input,
                                const Sequences& sequences, std::span<State* const> states) const {
  const std::int64_t tokens = input.shape[0];
  const std::int64_t heads = config_.num_heads;
  const std::int64_t values = config_.value_dim / heads;
  const TensorView projected =
      project(ctx, scratch, input,
              joined({&weights_.q_proj, &weights_.k_proj, &weights_.v_proj}));  // [T, 3·H·K]
  const TensorView beta =
      project(ctx, scratch, input, weights_.b_proj->value, {}, DType::kF32);  // [T, H]
  const auto taps = [](const Param& conv) {
    return conv.value.reshaped({conv.shape[0], conv.shape[2]});
  };
  const DeltaConvolutions convolutions{
      .q = taps(*weights_.q_conv1d),
      .k = taps(*weights_.k_conv1d),
      .v = taps(*weights_.v_conv1d),
      .q_states = state_pointers(scratch, states, &State::q_conv),
      .k_states = state_pointers(scratch, states, &State::k_conv),
      .v_states = state_pointers(scratch, states, &State::v_conv),
  };
  const std::span<float* const> recurrent = state_pointers(scratch, states, &State::recurrent);
  const TensorView o = scratch.activation({tokens, config_.value_dim});  // [T, H·V]
  const Shape of_heads{tokens, heads, values};
  const Shape rows{tokens * heads, values};
  const bool single = tokens == sequences.count() && values == kDeltaTokenHead;
  if (single && !weights_.g_proj) {
    ops::delta_token(ctx, {.projected = projected,
                           .convolutions = convolutions,
                           .beta = beta,
                           .states = recurrent,
                           .norm = weights_.o_norm.value,
                           .norm_eps = config_.norm_eps,
                           .o = o});
    return o;
  }
  const TensorView q = scratch.activation(of_heads);  // [T, H, K]
  const TensorView k = scratch.activation(of_heads);  // [T, H, K]
  const TensorView v = scratch.activation(of_heads);  // [T, H, V]
  ops::delta_inputs(ctx, {.projected = projected,
                          .convolutions = convolutions,
                          .sequences = sequences,
                          .beta = beta,
                          .q = q,
                          .k = k,
                          .v = v});
  ops::delta_rule(ctx, {.q = q,
                        .k = k,
                        .v = v,
                        .beta = beta,
                        .sequences = sequences,
                        .states = recurrent,
                        .o = o.reshaped(of_heads)});
  TensorView gate;  // [T, H·V]
  if (weights_.g_proj) gate = project(ctx, scratch, input, weights_.g_proj->value);
  ops::rms_norm(ctx, {.x = o.reshaped(rows),
                      .w = weights_.o_norm.value,
                      .gate = weights_.g_proj ? gate.reshaped(rows) : TensorView{},
                      .gate_activation = Activation::kSilu,
                      .y = o.reshaped(rows),
                      .eps = config_.norm_eps});
  return o;
}

bool DeltaNetMixer::has_step() const {
  const std::int64_t heads = config_.num_heads;
  return !weights_.norm && !weights_.g_proj && weights_.b_proj && weights_.q_conv1d &&
         config_.conv_size == kStepConvWidth && config_.qk_activation == Activation::kSilu &&
         config_.qk_norm == FeatureNorm::kL2 && config_.key_dim == heads * kStepHeadDim &&
         config_.value_dim == heads * kStepHeadDim && config_.hidden_size % 256 == 0 &&
         config_.value_dim % 256 == 0 && weights_.q_proj.value.dtype == DType::kBF16;
}

void DeltaNetMixer::step(Context& ctx, const ConstTensorView& norm, float eps,
                         std::span<State* const> states, const TensorView& hidden) const {
  const std::int64_t batch = hidden.shape[0];
  const std::int64_t heads = config_.num_heads;
  const Shape rows{batch, config_.value_dim};
  const Shape of_heads{batch, heads, kStepHeadDim};
  ScratchScope scratch(ctx);
  const TensorView q = scratch.tensor(rows);
  const TensorView k = scratch.tensor(rows);
  const TensorView v = scratch.tensor(rows);
  const TensorView o = scratch.tensor(rows);
  const TensorView beta = scratch.tensor({batch, heads});
  const auto convolved = [&](const Param& proj, const Param& conv, Tensor State::*state,
                             const TensorView& y) {
    return StepLinearPart{.w = proj.value,
                          .y = y,
                          .epilogue = StepEpilogue::kConvSilu,
                          .conv = conv.value.reshaped({conv.shape[0], conv.shape[2]}),
                          .conv_states = state_pointers(scratch, states, state)};
  };
  const std::array parts{
      convolved(weights_.q_proj, *weights_.q_conv1d, &State::q_conv, q),
      convolved(weights_.k_proj, *weights_.k_conv1d, &State::k_conv, k),
      convolved(weights_.v_proj, *weights_.v_conv1d, &State::v_conv, v),
      StepLinearPart{.w = weights_.b_proj->value, .y = beta, .epilogue = StepEpilogue::kSigmoid}};
  ops::step_linear(ctx, {.x = hidden, .norm = norm, .norm_eps = eps, .parts = parts});
  ops::delta_rule_step(ctx, {.q = q.reshaped(of_heads),
                             .k = k.reshaped(of_heads),
                             .v = v.reshaped(of_heads),
                             .beta = beta,
                             .states = state_pointers(scratch, states, &State::recurrent),
                             .o = o.reshaped(of_heads)});
  const StepLinearPart output{
      .w = weights_.o_proj.value, .y = hidden, .epilogue = StepEpilogue::kAdd};
  ops::step_linear(
      ctx,
      {.x = o, .norm = weights_.o_norm.value, .norm_eps = config_.norm_eps, .parts = {&output, 1}});
}

void DeltaNetMixer::backward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                             const Saved& saved, const TensorView& dy, const TensorView& dx,
                             Gradients& gradients) const {
  ScratchScope scratch(ctx);
  const TensorView d_o = scratch.tensor(saved.o.shape);  // [T, H, V]
  ops::linear_backward(ctx, {.dy = dy,
                             .x = saved.output,
                             .w = weights_.o_proj.value,
                             .dx = d_o.reshaped(saved.output.shape),
                             .dw = gradients.of(weights_.o_proj)});
  const Shape rows{d_o.shape[0] * d_o.shape[1], d_o.shape[2]};
  const TensorView dgate = weights_.g_proj ? scratch.tensor(saved.gate.shape) : TensorView{};
  ops::rms_norm_backward(ctx, {.x = saved.o.reshaped(rows),
                               .w = weights_.o_norm.value,
                               .gate = weights_.g_proj ? saved.gate.reshaped(rows) : TensorView{},
                               .gate_activation = Activation::kSilu,
                               .eps = config_.norm_eps,
                               .dy = d_o.reshaped(rows),
                               .dx = d_o.reshaped(rows),
                               .dw = gradients.of(weights_.o_norm),
                               .dgate = weights_.g_proj ? dgate.reshaped(rows) : TensorView{}});
  const TensorView dinput = weights_.norm ? scratch.tensor(x.shape) : dx;  // [T, C]
  if (weights_.g_proj) {
    ops::linear_backward(ctx, {.dy = dgate,
                               .x = saved.input,
                               .w = weights_.g_proj->value,
                               .dx = dinput,
                               .dw = gradients.of(weights_.g_proj)});
  }
  backward_inputs(ctx, sequences, saved, d_o, dinput, weights_.g_proj.has_value(), gradients);
  if (!weights_.norm) return;
  ops::rms_norm_backward(ctx, {.x = x,
                               .w = weights_.norm->value,
                               .eps = config_.norm_eps,
                               .dy = dinput,
                               .dx = dx,
                               .accumulate_dx = true,
                               .dw = gradients.of(weights_.norm)});
}

void DeltaNetMixer::backward_inputs(Context& ctx, const Sequences& sequences, const Saved& saved,
                                    const TensorView& d_o, const TensorView& dinput,
                                    bool accumulate_dinput, Gradients& gradients) const {
  ScratchScope scratch(ctx);
  const TensorView dq = scratch.tensor(saved.q.shape);  // [T, H, K]
  const TensorView dk = scratch.tensor(saved.k.shape);  // [T, H, K]
  const TensorView dv = scratch.tensor(saved.v.shape);  // [T, H, V]
  const TensorView dbeta = weights_.b_proj ? scratch.tensor(saved.beta.shape) : TensorView{};
  ops::delta_rule_backward(ctx, {.q = saved.q,
                                 .k = saved.k,
                                 .v = saved.v,
                                 .beta = saved.beta,
                                 .sequences = sequences,
                                 .d_o = d_o,
                                 .dq = dq,
                                 .dk = dk,
                                 .dv = dv,
                                 .dbeta = dbeta});
  const auto through_features = [&](const TensorView& before, const TensorView& d) {
    ops::feature_map_backward(
        ctx,
        {.activation = head_activation(), .norm = config_.qk_norm, .x = before, .dy = d, .dx = d});
  };
  through_features(saved.q_convolved, dq);
  through_features(saved.k_convolved, dk);
  bool accumulate = accumulate_dinput;
  const auto through_projection = [&](const TensorView& projected, const Param& proj,
                                      const std::optional<Param>& conv, Activation activation,
                                      const TensorView& d) {
    project_and_convolve_backward(ctx, saved.input, projected, proj, conv, sequences, activation,
                                  d.reshaped(projected.shape), dinput, accumulate, gradients);
    accumulate = true;
  };
  through_projection(saved.q_projected, weights_.q_proj, weights_.q_conv1d, qk_conv_activation(),
                     dq);
  through_projection(saved.k_projected, weights_.k_proj, weights_.k_conv1d, qk_conv_activation(),
                     dk);
  through_projection(saved.v_projected, weights_.v_proj, weights_.v_conv1d, Activation::kSilu, dv);
  if (!weights_.b_proj) return;
  ops::activation_backward(
      ctx, {.activation = Activation::kSigmoid, .x = saved.beta_logits, .dy = dbeta, .dx = dbeta});
  ops::linear_backward(ctx, {.dy = dbeta,
                             .x = saved.input,
                             .w = weights_.b_proj->value,
                             .dx = dinput,
                             .accumulate_dx = true,
                             .dw = gradients.of(weights_.b_proj)});
}

}  // namespace deltafox
