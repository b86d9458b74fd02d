#include "model/blocks/mamba2.h"

#include <array>

#include "core/quantized.h"
#include "model/blocks/projection.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/ssd.h"
#include "ops/step.h"

namespace deltafox {

Mamba2Mixer::Mamba2Mixer(const Config& config)
    : config_(config),
      weights_{
          .in_proj = Param::matrix(
              {config.inner() + config.conv_channels() + config.num_heads, config.hidden_size},
              default_init(config.hidden_size)),
          .in_bias = {},
          .conv1d = depthwise_convolution(config.conv_channels(), config.conv_size),
          .conv1d_bias = {},
          .dt_bias = Param::vector({config.num_heads}, config.dt_bias_init),
          .a_log = Param::vector({config.num_heads}, Init::log_index()),
          .d = Param::vector({config.num_heads}, Init::constant(1)),
          .norm = Param::vector({config.inner()}, Init::constant(1)),
          .out_proj = Param::matrix({config.hidden_size, config.inner()}, config.out_init),
          .out_bias = {},
      } {
  weights_.in_proj.packable =
      config.inner() % kPanelRows == 0 && config.conv_channels() % kPanelRows == 0;
  if (config.use_bias) {
    weights_.in_bias = Param::vector({weights_.in_proj.shape[0]}, Init::constant(0));
    weights_.out_bias = Param::vector({config.hidden_size}, Init::constant(0));
  }
  if (config.use_conv_bias) {
    weights_.conv1d_bias = Param::vector({config.conv_channels()}, default_init(config.conv_size));
  }
}

Mamba2Mixer::State Mamba2Mixer::new_state(Device device, DType /*activation_dtype*/) const {
  return {.conv = Tensor(DType::kF32, {config_.conv_channels(), config_.conv_size}, device),
          .ssm = Tensor(DType::kF32, {config_.num_heads, config_.state_size, config_.head_dim},
                        device)};
}

TensorView Mamba2Mixer::output(Context& ctx, ScratchScope& scratch, const Saved& saved) const {
  const TensorView y = scratch.like(saved.y);
  const Shape groups{saved.z.shape[0] * config_.num_groups, config_.inner() / config_.num_groups};
  ops::rms_norm(ctx, {.x = saved.y.reshaped(groups),
                      .w = weights_.norm.value,
                      .gate = saved.z.reshaped(groups),
                      .gate_activation = Activation::kSilu,
                      .gate_first = true,
                      .y = y.reshaped(groups),
                      .eps = config_.norm_eps});
  return y.reshaped(saved.z.shape);
}

void Mamba2Mixer::forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                          std::span<State* const> states, const TensorView& hidden,
                          Saved* saved) const {
  const std::int64_t tokens = x.shape[0];
  const std::int64_t inner = config_.inner();
  ScratchScope scratch(ctx, saved != nullptr);
  ScratchScope state_scratch(ctx);
  const auto part = [&](std::int64_t begin, std::int64_t count, DType dtype) {
    return project(
        ctx, scratch, x, rows_of(weights_.in_proj.value, begin, count),
        weights_.in_bias ? rows_of(weights_.in_bias->value, begin, count) : ConstTensorView{},
        dtype);
  };
  const TensorView z = part(0, inner, ctx.activation_dtype());  // [T, H·P]
  const TensorView inputs =
      part(inner, config_.conv_channels(), ctx.activation_dtype());  // [T, H·P + 2·G·N]
  const TensorView dt =
      part(inner + config_.conv_channels(), config_.num_heads, DType::kF32);  // [T, H]
  const TensorView xbc =
      convolve(ctx, scratch, inputs, weights_.conv1d, value_of(weights_.conv1d_bias), sequences,
               state_pointers(ctx, state_scratch, sequences, states, &State::conv,
                              {config_.conv_channels(), config_.conv_size}),
               config_.conv_activation);

  const TensorView y = scratch.activation({tokens, config_.num_heads, config_.head_dim});
  ops::ssd(ctx,
           {.xbc = xbc,
            .dt = dt,
            .dt_bias = weights_.dt_bias.value,
            .a_log = weights_.a_log.value,
            .d = weights_.d.value,
            .dt_min = config_.dt_min,
            .dt_max = config_.dt_max,
            .num_groups = config_.num_groups,
            .sequences = sequences,
            .states = state_pointers(ctx, state_scratch, sequences, states, &State::ssm,
                                     {config_.num_heads, config_.state_size, config_.head_dim}),
            .y = y});
  const Saved kept{.z = z, .inputs = inputs, .xbc = xbc, .dt = dt, .y = y};
  ScratchScope output_scratch(ctx);
  add_output(ctx, output(ctx, output_scratch, kept), weights_.out_proj, value_of(weights_.out_bias),
             hidden);
  if (saved != nullptr) *saved = kept;
}

bool Mamba2Mixer::has_step() const {
  return !weights_.in_bias && config_.conv_size == kStepConvWidth &&
         config_.conv_activation == Activation::kSilu && config_.num_groups == 1 &&
         config_.hidden_size % 256 == 0 && config_.inner() % 256 == 0 &&
         weights_.in_proj.value.dtype != DType::kF32;
}

void Mamba2Mixer::step(Context& ctx, const ConstTensorView& norm, float eps,
                       std::span<State* const> states, const TensorView& hidden) const {
  const std::int64_t batch = hidden.shape[0];
  const std::int64_t inner = config_.inner();
  const std::int64_t channels = config_.conv_channels();
  ScratchScope scratch(ctx);
  const TensorView z = scratch.tensor({batch, inner});
  const TensorView xbc = scratch.tensor({batch, channels});
  const TensorView dt = scratch.tensor({batch, config_.num_heads});
  const TensorView y = scratch.tensor({batch, config_.num_heads, config_.head_dim});
  const ConstTensorView w = weights_.in_proj.value;
  const std::array parts{
      StepLinearPart{.w = rows_of(w, 0, inner), .y = z},
      StepLinearPart{.w = rows_of(w, inner, channels),
                     .y = xbc,
                     .epilogue = StepEpilogue::kConvSilu,
                     .conv = weights_.conv1d.value.reshaped({channels, kStepConvWidth}),
                     .conv_bias = value_of(weights_.conv1d_bias),
                     .conv_states = state_pointers(scratch, states, &State::conv)},
      StepLinearPart{.w = rows_of(w, inner + channels, config_.num_heads), .y = dt}};
  ops::step_linear(ctx, {.x = hidden, .norm = norm, .norm_eps = eps, .parts = parts});
  ops::ssd_step(ctx, {.xbc = xbc,
                      .dt = dt,
                      .dt_bias = weights_.dt_bias.value,
                      .a_log = weights_.a_log.value,
                      .d = weights_.d.value,
                      .dt_min = config_.dt_min,
                      .dt_max = config_.dt_max,
                      .num_groups = config_.num_groups,
                      .states = state_pointers(scratch, states, &State::ssm),
                      .z = z.reshaped(y.shape),
                      .y = y});
  const StepLinearPart output{
      .w = weights_.out_proj.value, .y = hidden, .epilogue = StepEpilogue::kAdd};
  ops::step_linear(ctx, {.x = y.reshaped({batch, inner}),
                         .norm = weights_.norm.value,
                         .norm_eps = config_.norm_eps,
                         .parts = {&output, 1}});
}

void Mamba2Mixer::backward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                           const Saved& saved, const TensorView& dy, const TensorView& dx,
                           Gradients& gradients) const {
  const std::int64_t inner = config_.inner();
  ScratchScope scratch(ctx);
  const TensorView d_y = scratch.like(saved.y);           // [T, H, P]
  const TensorView normed = output(ctx, scratch, saved);  // [T, H·P]
  ops::linear_backward(ctx, {.dy = dy,
                             .x = normed,
                             .w = weights_.out_proj.value,
                             .dx = d_y.reshaped(normed.shape),
                             .dw = gradients.sum_of(weights_.out_proj),
                             .dbias = gradients.of(weights_.out_bias)});
  const Shape groups{x.shape[0] * config_.num_groups, inner / config_.num_groups};
  const TensorView dz = scratch.like(saved.z);  // [T, H·P]
  ops::rms_norm_backward(ctx, {.x = saved.y.reshaped(groups),
                               .w = weights_.norm.value,
                               .gate = saved.z.reshaped(groups),
                               .gate_activation = Activation::kSilu,
                               .gate_first = true,
                               .eps = config_.norm_eps,
                               .dy = d_y.reshaped(groups),
                               .dx = d_y.reshaped(groups),
                               .dw = gradients.of(weights_.norm),
                               .dgate = dz.reshaped(groups)});
  const TensorView dxbc = scratch.like(saved.xbc);  // [T, H·P + 2·G·N]
  const TensorView ddt = scratch.like(saved.dt);    // [T, H]
  ops::ssd_backward(ctx, {.xbc = saved.xbc,
                          .dt = saved.dt,
                          .dt_bias = weights_.dt_bias.value,
                          .a_log = weights_.a_log.value,
                          .d = weights_.d.value,
                          .dt_min = config_.dt_min,
                          .dt_max = config_.dt_max,
                          .num_groups = config_.num_groups,
                          .sequences = sequences,
                          .dy = d_y,
                          .dxbc = dxbc,
                          .ddt = ddt,
                          .d_dt_bias = gradients.of(weights_.dt_bias),
                          .d_a_log = gradients.of(weights_.a_log),
                          .dd = gradients.of(weights_.d)});
  const TensorView dinputs = scratch.like(saved.inputs);  // [T, H·P + 2·G·N]
  convolve_backward(ctx, saved.inputs, weights_.conv1d, weights_.conv1d_bias, sequences,
                    config_.conv_activation, dxbc, dinputs, gradients);
  const auto through_rows = [&](std::int64_t begin, const TensorView& d) {
    const std::int64_t count = d.shape[1];
    const TensorView dbias = gradients.of(weights_.in_bias);
    ops::linear_backward(ctx,
                         {.dy = d,
                          .x = x,
                          .w = rows_of(weights_.in_proj.value, begin, count),
                          .dx = dx,
                          .accumulate_dx = begin > 0,
                          .dw = rows_of(gradients.zeroed(ctx, weights_.in_proj), begin, count),
                          .dbias = weights_.in_bias ? rows_of(dbias, begin, count) : TensorView{}});
  };
  through_rows(0, dz);
  through_rows(inner, dinputs);
  through_rows(inner + config_.conv_channels(), ddt);
}

}  // namespace deltafox
