#include "model/blocks/delta_net.h"

#include <array>
#include <bit>
#include <cassert>

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

ConstTensorView DeltaNetMixer::normed(Context& ctx, ScratchScope& scratch,
                                      const ConstTensorView& x) const {
  if (!weights_.norm) return x;
  const TensorView y = scratch.activation(x.shape);
  ops::rms_norm(ctx, {.x = x, .w = weights_.norm->value, .y = y, .eps = config_.norm_eps});
  return y;
}

DeltaNetMixer::Inputs DeltaNetMixer::inputs(Context& ctx, ScratchScope& scratch,
                                            const ConstTensorView& of_beta,
                                            const Sequences& sequences,
                                            std::span<State* const> states, const Saved& saved,
                                            bool keep, bool backward) const {
  Inputs in;
  if (weights_.b_proj)
    in.beta = keep ? copy_of(ctx, scratch, saved.beta_logits) : saved.beta_logits;
  const std::int64_t tokens = sequences.tokens();
  if (saved.joined.data != nullptr) {
    in.q = scratch.activation(keys(tokens));
    in.k = scratch.activation(keys(tokens));
    in.v = scratch.activation(values(tokens));
    const DeltaInputsArgs args{.projected = saved.joined,
                               .convolutions = convolutions(ctx, scratch, sequences, states),
                               .sequences = sequences,
                               .x = of_beta,
                               .b_proj = weights_.b_proj->value,
                               .beta = in.beta,
                               .q = in.q,
                               .k = in.k,
                               .v = in.v};
    if (of_beta.data != nullptr) {
      in.within = args;
    } else {
      ops::delta_inputs(ctx, args);
    }
    return in;
  }
  const auto convolved = [&](const TensorView& projected, const std::optional<Param>& conv,
                             Tensor State::*conv_state, Activation activation,
                             std::int64_t norm_width = 0) {
    if (!conv) {
      const TensorView y = copy_of(ctx, scratch, projected);
      ops::activation(ctx, {.activation = activation, .x = y});
      return y;
    }
    const std::span<float*> conv_states =
        state_pointers(ctx, scratch, sequences, states, conv_state, state_shape(*conv));
    return convolve(ctx, scratch, projected, *conv, {}, sequences, conv_states, activation,
                    norm_width);
  };
  // Where nothing else reads what is before the norm, the convolutions leave it out.
  const bool norm_within = config_.use_short_conv && !backward &&
                           head_activation() == Activation::kIdentity &&
                           config_.qk_norm == FeatureNorm::kL2;
  const std::int64_t norm_width = norm_within ? config_.key_dim / config_.num_heads : 0;
  const auto mapped = [&](const TensorView& before) {
    if (norm_within) return before;
    const TensorView y = backward ? copy_of(ctx, scratch, before) : before;
    ops::feature_map(ctx, {.activation = head_activation(), .norm = config_.qk_norm, .x = y});
    return y;
  };
  in.q_convolved = convolved(saved.q_projected, weights_.q_conv1d, &State::q_conv,
                             qk_conv_activation(), norm_width)
                       .reshaped(keys(tokens));
  in.k_convolved = convolved(saved.k_projected, weights_.k_conv1d, &State::k_conv,
                             qk_conv_activation(), norm_width)
                       .reshaped(keys(tokens));
  in.v = convolved(saved.v_projected, weights_.v_conv1d, &State::v_conv, Activation::kSilu)
             .reshaped(values(tokens));
  in.q = mapped(in.q_convolved);
  in.k = mapped(in.k_convolved);
  if (weights_.b_proj) ops::activation(ctx, {.activation = Activation::kSigmoid, .x = in.beta});
  return in;
}

DeltaConvolutions DeltaNetMixer::convolutions(Context& ctx, ScratchScope& scratch,
                                              const Sequences& sequences,
                                              std::span<State* const> states) const {
  const auto taps = [](const Param& conv) {
    return conv.value.reshaped({conv.shape[0], conv.shape[2]});
  };
  const auto conv_states = [&](Tensor State::*state, const Param& conv) {
    return state_pointers(ctx, scratch, sequences, states, state, state_shape(conv));
  };
  return {
      .q = taps(*weights_.q_conv1d),
      .k = taps(*weights_.k_conv1d),
      .v = taps(*weights_.v_conv1d),
      .q_states = conv_states(&State::q_conv, *weights_.q_conv1d),
      .k_states = conv_states(&State::k_conv, *weights_.k_conv1d),
      .v_states = conv_states(&State::v_conv, *weights_.v_conv1d),
  };
}

ConstTensorView DeltaNetMixer::joined_projections(const Context& ctx) const {
  const auto keys = static_cast<std::uint64_t>(config_.key_dim / config_.num_heads);
  // Weights that lie each by itself may be neighbours by chance.
  const bool fits = ctx.device() == Device::kCuda && weights_.q_proj.in_one_piece &&
                    weights_.q_conv1d && weights_.b_proj && config_.conv_size == kDeltaConvWidth &&
                    config_.qk_activation == Activation::kSilu &&
                    config_.qk_norm == FeatureNorm::kL2 && config_.key_dim == config_.value_dim &&
                    keys >= 8 && keys <= 256 && std::has_single_bit(keys);
  if (!fits) return {};
  return joined({weights_.q_proj.value, weights_.k_proj.value, weights_.v_proj.value});
}

ConstTensorView DeltaNetMixer::joined_inputs(const Context& ctx) const {
  ConstTensorView w = joined({joined_projections(ctx), weights_.b_proj->value});
  w.shape = {w.shape[0] - weights_.b_proj->shape[0] + weights_.b_proj->padded_rows(), w.shape[1]};
  return w;
}

TensorView DeltaNetMixer::output(Context& ctx, ScratchScope& scratch, const TensorView& o,
                                 const TensorView& gate, const TensorView& scales) const {
  const Shape rows{o.shape[0] * o.shape[1], o.shape[2]};
  const TensorView y = scratch.like(o);
  ops::rms_norm(ctx, {.x = o.reshaped(rows),
                      .w = weights_.o_norm.value,
                      .gate = weights_.g_proj ? gate.reshaped(rows) : TensorView{},
                      .gate_activation = Activation::kSilu,
                      .y = y.reshaped(rows),
                      .scales = scales,
                      .eps = config_.norm_eps});
  return y.reshaped({o.shape[0], config_.value_dim});
}

void DeltaNetMixer::forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                            std::span<State* const> states, const TensorView& hidden,
                            Saved* saved) const {
  const std::int64_t tokens = x.shape[0];
  const std::int64_t heads = config_.num_heads;
  ScratchScope kept_scratch(ctx, saved != nullptr);
  ScratchScope scratch(ctx);
  const ConstTensorView input = normed(ctx, scratch, x);  // [T, C]
  const bool single = tokens == sequences.count() && saved == nullptr && !states.empty();
  if (single && has_token(ctx)) {
    const TensorView o = token(ctx, scratch, input, sequences, states);  // [B, H·V]
    return add_output(ctx, o, weights_.o_proj, {}, hidden);
  }
  const auto projected = [&](const Param& proj) {
    return project(ctx, kept_scratch, input, proj.value);
  };
  Saved kept;
  if (const ConstTensorView w = joined_projections(ctx); w.data != nullptr) {
    kept.joined = project(ctx, kept_scratch, input, w);
  } else {
    kept.q_projected = projected(weights_.q_proj);
    kept.k_projected = projected(weights_.k_proj);
    kept.v_projected = projected(weights_.v_proj);
  }
  // Where nothing needs its logits, beta is computed with what else the rule reads.
  const bool beta_within = saved == nullptr && kept.joined.data != nullptr &&
                           input.dtype == DType::kBF16 &&
                           weights_.b_proj->value.dtype == DType::kBF16 &&
                           input.shape[1] % 8 == 0 && heads <= kDeltaInputsHeads;
  if (beta_within) {
    kept.beta_logits = scratch.tensor({tokens, heads});
  } else if (weights_.b_proj) {
    kept.beta_logits = project(ctx, kept_scratch, input, weights_.b_proj->value, {}, DType::kF32);
  }
  if (weights_.g_proj) kept.gate = projected(*weights_.g_proj);
  const bool keeps_output = saved != nullptr && !weights_.g_proj;
  const TensorView o = (keeps_output ? scratch : kept_scratch).activation(values(tokens));
  // Where nothing else reads o, the rule writes it normed.
  const bool norm_within = saved == nullptr && !weights_.g_proj;
  {
    ScratchScope input_scratch(ctx);
    const Inputs in = inputs(ctx, input_scratch, beta_within ? input : ConstTensorView{}, sequences,
                             states, kept, saved != nullptr, false);
    const Shape state{heads, config_.key_dim / heads, config_.value_dim / heads};
    ops::delta_rule(ctx, {.q = in.q,
                          .k = in.k,
                          .v = in.v,
                          .beta = in.beta,
                          .sequences = sequences,
                          .states = state_pointers(ctx, input_scratch, sequences, states,
                                                   &State::recurrent, state),
                          .bf16_products = weights_.q_proj.value.dtype != DType::kF32,
                          .o = o,
                          .norm = norm_within ? weights_.o_norm.value : ConstTensorView{},
                          .norm_eps = config_.norm_eps,
                          .inputs = in.within ? &*in.within : nullptr,
                          .next = weights_.o_proj.value});
  }
  if (keeps_output) {
    kept.output_scales = kept_scratch.tensor({tokens * heads});
    kept.output = output(ctx, kept_scratch, o, {}, kept.output_scales);
    add_output(ctx, kept.output, weights_.o_proj, {}, hidden);
  } else if (norm_within) {
    add_output(ctx, o.reshaped({tokens, config_.value_dim}), weights_.o_proj, {}, hidden);
  } else {
    kept.o = o;
    if (hidden.data != nullptr) {
      add_output(ctx, output(ctx, scratch, o, kept.gate), weights_.o_proj, {}, hidden);
    }
  }
  if (saved != nullptr) *saved = kept;
}

bool DeltaNetMixer::has_token(const Context& ctx) const {
  return !weights_.g_proj && weights_.b_proj && config_.hidden_size % 8 == 0 &&
         config_.value_dim == config_.num_heads * kDeltaTokenHead &&
         weights_.b_proj->value.dtype == ctx.activation_dtype() &&
         joined_projections(ctx).data != nullptr;
}

TensorView DeltaNetMixer::token(Context& ctx, ScratchScope& scratch, const ConstTensorView& input,
                                const Sequences& sequences, std::span<State* const> states) const {
  const TensorView projected = project(ctx, scratch, input, joined_projections(ctx));
  const TensorView o = scratch.activation({input.shape[0], config_.value_dim});
  ops::delta_token(ctx, {.x = input,
                         .b_proj = weights_.b_proj->value,
                         .projected = projected,
                         .convolutions = convolutions(ctx, scratch, sequences, states),
                         .states = state_pointers(scratch, states, &State::recurrent),
                         .norm = weights_.o_norm.value,
                         .norm_eps = config_.norm_eps,
                         .o = o});
  return o;
}

bool DeltaNetMixer::has_step() const {
  const std::int64_t heads = config_.num_heads;
  return !weights_.norm && !weights_.g_proj && weights_.b_proj && weights_.q_conv1d &&
         config_.conv_size == kStepConvWidth && config_.qk_activation == Activation::kSilu &&
         config_.qk_norm == FeatureNorm::kL2 && config_.key_dim == heads * kStepHeadDim &&
         config_.value_dim == heads * kStepHeadDim && config_.hidden_size % 256 == 0 &&
         config_.value_dim % 256 == 0 && weights_.q_proj.value.dtype != DType::kF32;
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
  const TensorView d_o = scratch.activation(values(x.shape[0]));  // [T, H, V]
  const TensorView dgate = weights_.g_proj ? scratch.like(saved.gate) : TensorView{};
  output_backward(ctx, saved, dy, d_o, dgate, gradients);
  const ConstTensorView input = normed(ctx, scratch, x);                       // [T, C]
  const TensorView dinput = weights_.norm ? scratch.activation(x.shape) : dx;  // [T, C]
  if (weights_.g_proj) {
    ops::linear_backward(ctx, {.dy = dgate,
                               .x = input,
                               .w = weights_.g_proj->value,
                               .dx = dinput,
                               .dw = gradients.sum_of(weights_.g_proj)});
  }
  inputs_backward(ctx, input, sequences, saved, d_o, dinput, gradients);
  if (!weights_.norm) return;
  ops::rms_norm_backward(ctx, {.x = x,
                               .w = weights_.norm->value,
                               .eps = config_.norm_eps,
                               .dy = dinput,
                               .dx = dx,
                               .accumulate_dx = true,
                               .dw = gradients.of(weights_.norm)});
}

void DeltaNetMixer::output_backward(Context& ctx, const Saved& saved, const TensorView& dy,
                                    const TensorView& d_o, const TensorView& dgate,
                                    Gradients& gradients) const {
  ScratchScope scratch(ctx);
  const bool kept = saved.output.data != nullptr;
  const TensorView out = kept ? saved.output : output(ctx, scratch, saved.o, saved.gate);
  ops::linear_backward(ctx, {.dy = dy,
                             .x = out,
                             .w = weights_.o_proj.value,
                             .dx = d_o.reshaped(out.shape),
                             .dw = gradients.sum_of(weights_.o_proj)});
  const Shape rows{d_o.shape[0] * d_o.shape[1], d_o.shape[2]};
  ops::rms_norm_backward(ctx, {.x = kept ? TensorView{} : saved.o.reshaped(rows),
                               .y = kept ? out.reshaped(rows) : TensorView{},
                               .scales = saved.output_scales,
                               .w = weights_.o_norm.value,
                               .gate = weights_.g_proj ? saved.gate.reshaped(rows) : TensorView{},
                               .gate_activation = Activation::kSilu,
                               .eps = config_.norm_eps,
                               .dy = d_o.reshaped(rows),
                               .dx = d_o.reshaped(rows),
                               .dw = gradients.of(weights_.o_norm),
                               .dgate = weights_.g_proj ? dgate.reshaped(rows) : TensorView{}});
}

void DeltaNetMixer::inputs_backward(Context& ctx, const ConstTensorView& input,
                                    const Sequences& sequences, const Saved& saved,
                                    const TensorView& d_o, const TensorView& dinput,
                                    Gradients& gradients) const {
  ScratchScope scratch(ctx);
  const Inputs in = inputs(ctx, scratch, {}, sequences, {}, saved, true, true);
  const TensorView dq = scratch.like(in.q);  // [T, H, K]
  const TensorView dk = scratch.like(in.k);  // [T, H, K]
  const TensorView dv = scratch.like(in.v);  // [T, H, V]
  const TensorView dbeta = weights_.b_proj ? scratch.like(in.beta) : TensorView{};
  ops::delta_rule_backward(ctx, {.q = in.q,
                                 .k = in.k,
                                 .v = in.v,
                                 .beta = in.beta,
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
  if (saved.joined.data != nullptr) {
    const ConstTensorView w = joined_inputs(ctx);
    const TensorView d = scratch.activation({sequences.tokens(), w.shape[0]});
    const auto taps = [](const auto& conv) {
      return conv.reshaped({conv.shape[0], kDeltaConvWidth});
    };
    ops::delta_inputs_backward(ctx, {.projected = saved.joined,
                                     .beta_logits = saved.beta_logits,
                                     .q = taps(weights_.q_conv1d->value),
                                     .k = taps(weights_.k_conv1d->value),
                                     .v = taps(weights_.v_conv1d->value),
                                     .sequences = sequences,
                                     .dq = dq,
                                     .dk = dk,
                                     .dv = dv,
                                     .dbeta = dbeta,
                                     .d_projected = d,
                                     .dq_conv = taps(gradients.of(weights_.q_conv1d)),
                                     .dk_conv = taps(gradients.of(weights_.k_conv1d)),
                                     .dv_conv = taps(gradients.of(weights_.v_conv1d))});
    ops::linear_backward(ctx, {.dy = d,
                               .x = input,
                               .w = w,
                               .dx = dinput,
                               .accumulate_dx = weights_.g_proj.has_value(),
                               .dw = gradients.sum_of({&weights_.q_proj, &weights_.k_proj,
                                                       &weights_.v_proj, &*weights_.b_proj})});
    return;
  }
  through_features(in.q_convolved, dq);
  through_features(in.k_convolved, dk);
  projections_backward(ctx, input, sequences, saved, dq, dk, dv, dinput, gradients);
  if (!weights_.b_proj) return;
  ops::activation_backward(
      ctx, {.activation = Activation::kSigmoid, .x = saved.beta_logits, .dy = dbeta, .dx = dbeta});
  ops::linear_backward(ctx, {.dy = dbeta,
                             .x = input,
                             .w = weights_.b_proj->value,
                             .dx = dinput,
                             .accumulate_dx = true,
                             .dw = gradients.sum_of(weights_.b_proj)});
}

void DeltaNetMixer::projections_backward(Context& ctx, const ConstTensorView& input,
                                         const Sequences& sequences, const Saved& saved,
                                         const TensorView& dq, const TensorView& dk,
                                         const TensorView& dv, const TensorView& dinput,
                                         Gradients& gradients) const {
  const std::int64_t tokens = input.shape[0];
  bool accumulate = weights_.g_proj.has_value();
  const auto through_projection = [&](const TensorView& projected, const Param& proj,
                                      const std::optional<Param>& conv, Activation activation,
                                      const TensorView& d) {
    project_and_convolve_backward(ctx, input, projected, proj, conv, sequences, activation,
                                  d.reshaped({tokens, proj.shape[0]}), dinput, accumulate,
                                  gradients);
    accumulate = true;
  };
  through_projection(saved.q_projected, weights_.q_proj, weights_.q_conv1d, qk_conv_activation(),
                     dq);
  through_projection(saved.k_projected, weights_.k_proj, weights_.k_conv1d, qk_conv_activation(),
                     dk);
  through_projection(saved.v_projected, weights_.v_proj, weights_.v_conv1d, Activation::kSilu, dv);
}

}  // namespace deltafox
