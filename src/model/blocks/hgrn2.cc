#include "model/blocks/hgrn2.h"

#include "model/blocks/projection.h"
#include "ops/gla.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"

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

Hgrn2Mixer::State Hgrn2Mixer::new_state() const {
  State state;
  if (config_.use_short_conv) {
    state.q_conv = Tensor(DType::kF32, {weights_.q_proj.shape[0], config_.conv_size});
    state.f_conv = Tensor(DType::kF32, {weights_.f_proj.shape[0], config_.conv_size});
    state.i_conv = Tensor(DType::kF32, {config_.hidden_size, config_.conv_size});
  }
  state.recurrent = Tensor(DType::kF32, {config_.num_heads, config_.expand_ratio,
                                         config_.hidden_size / config_.num_heads});
  return state;
}

void Hgrn2Mixer::forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                         std::span<State* const> states, const TensorView& hidden) const {
  const std::int64_t tokens = x.shape[0];
  const Shape keys{tokens, config_.num_heads, config_.expand_ratio};
  const Shape values{tokens, config_.num_heads, config_.hidden_size / config_.num_heads};
  ScratchScope scratch(ctx);
  const auto projected = [&](const Param& proj, const std::optional<Param>& conv,
                             Tensor State::*conv_state, Activation activation) {
    return project_and_convolve(ctx, scratch, x, proj, conv, sequences,
                                state_pointers(scratch, states, conv_state), activation);
  };
  const TensorView q =
      projected(weights_.q_proj, weights_.q_conv1d, &State::q_conv, Activation::kSilu)
          .reshaped(keys);  // [T, H, K]
  const TensorView g =
      projected(weights_.f_proj, weights_.f_conv1d, &State::f_conv, Activation::kIdentity)
          .reshaped(keys);  // [T, H, K]
  const TensorView v =
      projected(weights_.i_proj, weights_.i_conv1d, &State::i_conv, Activation::kIdentity)
          .reshaped(values);                  // [T, H, V]
  const TensorView k = scratch.tensor(keys);  // [T, H, K]
  ops::forget_gate(ctx, {.x = g, .k = k});

  const TensorView o = scratch.tensor(values);  // [T, H, V]
  ops::gla(ctx, {.q = q,
                 .k = k,
                 .g = g,
                 .v = v,
                 .sequences = sequences,
                 .states = state_pointers(scratch, states, &State::recurrent),
                 .o = o});
  const TensorView rows = o.reshaped(hidden.shape);  // [T, C]
  ops::rms_norm(ctx,
                {.x = rows, .w = value_of(weights_.g_norm), .y = rows, .eps = config_.norm_eps});
  ops::linear(ctx, {.x = rows, .w = weights_.o_proj.value, .y = hidden, .accumulate = true});
}

}  // namespace deltafox
