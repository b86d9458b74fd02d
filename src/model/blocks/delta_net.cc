#include "model/blocks/delta_net.h"

#include "model/blocks/projection.h"
#include "ops/delta_rule.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"

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

DeltaNetMixer::State DeltaNetMixer::new_state() const {
  State state;
  if (config_.use_short_conv) {
    state.q_conv = Tensor(DType::kF32, {config_.key_dim, config_.conv_size});
    state.k_conv = Tensor(DType::kF32, {config_.key_dim, config_.conv_size});
    state.v_conv = Tensor(DType::kF32, {config_.value_dim, config_.conv_size});
  }
  state.recurrent = Tensor(DType::kF32, {config_.num_heads, config_.key_dim / config_.num_heads,
                                         config_.value_dim / config_.num_heads});
  return state;
}

void DeltaNetMixer::forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                            std::span<State* const> states, const TensorView& hidden) const {
  const std::int64_t tokens = x.shape[0];
  const std::int64_t heads = config_.num_heads;
  const Shape keys{tokens, heads, config_.key_dim / heads};
  const Shape values{tokens, heads, config_.value_dim / heads};
  ScratchScope scratch(ctx);

  ConstTensorView input = x;  // [T, C]
  if (weights_.norm) {
    const TensorView normed = scratch.tensor(x.shape);
    ops::rms_norm(ctx, {.x = x, .w = weights_.norm->value, .y = normed, .eps = config_.norm_eps});
    input = normed;
  }

  // SiLU belongs to the convolution: without one, q and k stay raw. The other activations belong to
  // the heads, with or without one.
  const bool silu = config_.qk_activation == Activation::kSilu;
  const Activation qk_conv_activation =
      silu && config_.use_short_conv ? Activation::kSilu : Activation::kIdentity;
  const auto projected = [&](const Param& proj, const std::optional<Param>& conv,
                             Tensor State::*conv_state, Activation activation) {
    return project_and_convolve(ctx, scratch, input, proj, conv, sequences,
                                state_pointers(scratch, states, conv_state), activation);
  };
  const TensorView q =
      projected(weights_.q_proj, weights_.q_conv1d, &State::q_conv, qk_conv_activation)
          .reshaped(keys);  // [T, H, K]
  const TensorView k =
      projected(weights_.k_proj, weights_.k_conv1d, &State::k_conv, qk_conv_activation)
          .reshaped(keys);  // [T, H, K]
  const TensorView v =
      projected(weights_.v_proj, weights_.v_conv1d, &State::v_conv, Activation::kSilu)
          .reshaped(values);  // [T, H, V]
  const Activation head_activation = silu ? Activation::kIdentity : config_.qk_activation;
  ops::feature_map(ctx, {.activation = head_activation, .norm = config_.qk_norm, .x = q});
  ops::feature_map(ctx, {.activation = head_activation, .norm = config_.qk_norm, .x = k});

  TensorView beta;  // [T, H]
  if (weights_.b_proj) {
    beta = scratch.tensor({tokens, heads});
    ops::linear(ctx, {.x = input, .w = weights_.b_proj->value, .y = beta});
    ops::activation(ctx, {.activation = Activation::kSigmoid, .x = beta});
  }

  const TensorView o = scratch.tensor(values);  // [T, H, V]
  ops::delta_rule(ctx, {.q = q,
                        .k = k,
                        .v = v,
                        .beta = beta,
                        .sequences = sequences,
                        .states = state_pointers(scratch, states, &State::recurrent),
                        .o = o});

  TensorView gate;  // [T, H·V]
  if (weights_.g_proj) {
    gate = scratch.tensor({tokens, config_.value_dim});
    ops::linear(ctx, {.x = input, .w = weights_.g_proj->value, .y = gate});
  }
  const Shape rows{tokens * heads, values[2]};
  ops::rms_norm(ctx, {.x = o.reshaped(rows),
                      .w = weights_.o_norm.value,
                      .gate = weights_.g_proj ? gate.reshaped(rows) : TensorView{},
                      .gate_activation = Activation::kSilu,
                      .y = o.reshaped(rows),
                      .eps = config_.norm_eps});
  ops::linear(ctx, {.x = o.reshaped({tokens, config_.value_dim}),
                    .w = weights_.o_proj.value,
                    .y = hidden,
                    .accumulate = true});
}

}  // namespace deltafox
