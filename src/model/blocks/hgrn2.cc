#include "model/blocks/hgrn2.h"

#include <array>

#include "model/blocks/projection.h"
#include "ops/gla.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/step.h"

namespace deltafox {

Hgrn2Mixer::Hgrn2Mixer(const Config& config)
    : config_(config),
      weights_{
          .q_proj = xavier_projection(config.num_heads * config.expand_ratio, config.hidden_size),
          .f_proj = xavier_projection(config.num_heads * config.expand_ratio, config.hidden_size),
          .i_proj = xavier_projection(config.hidden_size, config.hidden_size),
          .q_conv1d = {},
          .f_conv1d = {},
          .i_conv1d = {},
          .g_norm = {},
          .o_proj = xavier_projection(config.hidden_size, config.hidden_size),
      } {
  if (config.elementwise_affine) {
    weights_.g_norm = Param::vector({config.hidden_size}, Init::constant(1));
  }
  if (config.use_short_conv) {
    weights_.q_conv1d = depthwise_convolution(weights_.q_proj.shape[0], config.conv_size);
    weights_.f_conv1d = depthwise_convolution(weights_.f_proj.shape[0], config.conv_size);
    weights_.i_conv1d = depthwise_convolution(config.hidden_size, config.conv_size);
  }
}

Hgrn2Mixer::State Hgrn2Mixer::new_state(Device device, DType /*activation_dtype*/) const {
  State state;
  if (config_.use_short_conv) {
    state.q_conv = Tensor(DType::kF32, {weights_.q_proj.shape[0], config_.conv_size}, device);
    state.f_conv = Tensor(DType::kF32, {weights_.f_proj.shape[0], config_.conv_size}, device);
    state.i_conv = Tensor(DType::kF32, {config_.hidden_size, config_.conv_size}, device);
  }
  state.recurrent = Tensor(
      DType::kF32,
      {config_.num_heads, config_.expand_ratio, config_.hidden_size / config_.num_heads}, device);
  return state;
}

TensorView Hgrn2Mixer::output(Context& ctx, ScratchScope& scratch, const Saved& saved) const {
  const TensorView y = scratch.like(saved.o);
  ops::rms_norm(ctx,
                {.x = saved.o, .w = value_of(weights_.g_norm), .y = y, .eps = config_.norm_eps});
  return y;
}

void Hgrn2Mixer::forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                         std::span<State* const> states, const TensorView& hidden,
                         Saved* saved) const {
  const std::int64_t tokens = x.shape[0];
  const Shape keys{tokens, config_.num_heads, config_.expand_ratio};
  const Shape values{tokens, config_.num_heads, config_.hidden_size / config_.num_heads};
  ScratchScope scratch(ctx, saved != nullptr);
  ScratchScope state_scratch(ctx);
  Saved kept;
  const auto projected = [&](const Param& proj, const std::optional<Param>& conv,
                             Tensor State::*conv_state, Activation activation, TensorView& before,
                             DType dtype) {
    return project_and_convolve(ctx, scratch, x, proj, conv, sequences,
                                state_pointers(ctx, state_scratch, sequences, states, conv_state,
                                               {proj.shape[0], config_.conv_size}),
                                activation, saved != nullptr ? &before : nullptr, dtype);
  };
  const DType kept_in = ctx.activation_dtype();
  const TensorView q = projected(weights_.q_proj, weights_.q_conv1d, &State::q_conv,
                                 Activation::kSilu, kept.q_projected, kept_in)
                           .reshaped(keys);  // [T, H, K]
  const TensorView g = projected(weights_.f_proj, weights_.f_conv1d, &State::f_conv,
                                 Activation::kIdentity, kept.f_projected, DType::kF32)
                           .reshaped(keys);  // [T, H, K]
  const TensorView v = projected(weights_.i_proj, weights_.i_conv1d, &State::i_conv,
                                 Activation::kIdentity, kept.i_projected, kept_in)
                           .reshaped(values);  // [T, H, V]
  const TensorView k = scratch.tensor(keys);   // [T, H, K]
  ops::forget_gate(ctx, {.x = g, .k = k});

  const TensorView o = scratch.activation(values);  // [T, H, V]
  ops::gla(ctx, {.q = q,
                 .k = k,
                 .g = g,
                 .v = v,
                 .sequences = sequences,
                 .states = state_pointers(ctx, state_scratch, sequences, states, &State::recurrent,
                                          {config_.num_heads, keys[2], values[2]}),
                 .o = o});
  kept.o = o.reshaped({tokens, config_.hidden_size});
  ScratchScope output_scratch(ctx);
  add_output(ctx, output(ctx, output_scratch, kept), weights_.o_proj, {}, hidden);
  if (saved == nullptr) return;
  kept.q = q;
  kept.g = g;
  kept.k = k;
  kept.v = v;
  *saved = kept;
}

bool Hgrn2Mixer::has_step() const {
  return !config_.use_short_conv && weights_.g_norm && config_.hidden_size % 256 == 0 &&
         weights_.q_proj.value.dtype != DType::kF32;
}

void Hgrn2Mixer::step(Context& ctx, const ConstTensorView& norm, float eps,
                      std::span<State* const> states, const TensorView& hidden) const {
  const std::int64_t batch = hidden.shape[0];
  const Shape keys{batch, config_.num_heads, config_.expand_ratio};
  const Shape values{batch, config_.num_heads, config_.hidden_size / config_.num_heads};
  ScratchScope scratch(ctx);
  const auto part = [&](const Param& proj) {
    return StepLinearPart{.w = proj.value, .y = scratch.tensor({batch, proj.shape[0]})};
  };
  const std::array parts{part(weights_.q_proj), part(weights_.f_proj), part(weights_.i_proj)};
  ops::step_linear(ctx, {.x = hidden, .norm = norm, .norm_eps = eps, .parts = parts});
  const TensorView o = scratch.tensor({batch, config_.hidden_size});
  ops::gla_step(ctx, {.q = parts[0].y.reshaped(keys),
                      .f = parts[1].y.reshaped(keys),
                      .v = parts[2].y.reshaped(values),
                      .states = state_pointers(scratch, states, &State::recurrent),
                      .o = o.reshaped(values)});
  const StepLinearPart output{
      .w = weights_.o_proj.value, .y = hidden, .epilogue = StepEpilogue::kAdd};
  ops::step_linear(ctx, {.x = o,
                         .norm = weights_.g_norm->value,
                         .norm_eps = config_.norm_eps,
                         .parts = {&output, 1}});
}

void Hgrn2Mixer::backward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                          const Saved& saved, const TensorView& dy, const TensorView& dx,
                          Gradients& gradients) const {
  ScratchScope scratch(ctx);
  const TensorView d_o = scratch.like(saved.o);  // [T, C]
  ops::linear_backward(ctx, {.dy = dy,
                             .x = output(ctx, scratch, saved),
                             .w = weights_.o_proj.value,
                             .dx = d_o,
                             .dw = gradients.sum_of(weights_.o_proj)});
  ops::rms_norm_backward(ctx, {.x = saved.o,
                               .w = value_of(weights_.g_norm),
                               .eps = config_.norm_eps,
                               .dy = d_o,
                               .dx = d_o,
                               .dw = gradients.of(weights_.g_norm)});
  const TensorView dq = scratch.like(saved.q);  // [T, H, K]
  const TensorView dk = scratch.like(saved.k);  // [T, H, K]
  const TensorView dg = scratch.like(saved.g);  // [T, H, K]
  const TensorView dv = scratch.like(saved.v);  // [T, H, V]
  ops::gla_backward(ctx, {.q = saved.q,
                          .k = saved.k,
                          .g = saved.g,
                          .v = saved.v,
                          .sequences = sequences,
                          .d_o = d_o.reshaped(saved.v.shape),
                          .dq = dq,
                          .dk = dk,
                          .dg = dg,
                          .dv = dv});
  ops::forget_gate_backward(ctx, {.g = saved.g, .k = saved.k, .dg = dg, .dk = dk, .dx = dg});
  bool accumulate = false;
  const auto through_projection = [&](const TensorView& projected, const Param& proj,
                                      const std::optional<Param>& conv, Activation activation,
                                      const TensorView& d) {
    project_and_convolve_backward(ctx, x, projected, proj, conv, sequences, activation,
                                  d.reshaped(projected.shape), dx, accumulate, gradients);
    accumulate = true;
  };
  through_projection(saved.q_projected, weights_.q_proj, weights_.q_conv1d, Activation::kSilu, dq);
  through_projection(saved.f_projected, weights_.f_proj, weights_.f_conv1d, Activation::kIdentity,
                     dg);
  through_projection(saved.i_projected, weights_.i_proj, weights_.i_conv1d, Activation::kIdentity,
                     dv);
}

}  // namespace deltafox
