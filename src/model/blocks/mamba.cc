#include "model/blocks/mamba.h"

#include "core/quantized.h"
#include "model/blocks/projection.h"
#include "ops/linear.h"
#include "ops/selective_scan.h"

namespace deltafox {

MambaMixer::MambaMixer(const Config& config)
    : config_(config),
      weights_{
          .in_proj = Param::matrix({2 * config.inner_size, config.hidden_size},
                                   default_init(config.hidden_size)),
          .in_bias = {},
          .conv1d = depthwise_convolution(config.inner_size, config.conv_size),
          .conv1d_bias = {},
          .x_proj = Param::matrix({config.dt_rank + 2 * config.state_size, config.inner_size},
                                  default_init(config.inner_size)),
          .dt_proj = Param::matrix({config.inner_size, config.dt_rank}, config.dt_init),
          .dt_bias = Param::vector({config.inner_size}, config.dt_bias_init),
          .a_log = Param::vector({config.inner_size, config.state_size}, Init::log_index()),
          .d = Param::vector({config.inner_size}, Init::constant(1)),
          .out_proj = Param::matrix({config.hidden_size, config.inner_size}, config.out_init),
          .out_bias = {},
      } {
  weights_.in_proj.packable = config.inner_size % kPanelRows == 0;
  weights_.x_proj.packable =
      config.dt_rank % kPanelRows == 0 && config.state_size % kPanelRows == 0;
  if (config.use_bias) {
    weights_.in_bias = Param::vector({2 * config.inner_size}, Init::constant(0));
    weights_.out_bias = Param::vector({config.hidden_size}, Init::constant(0));
  }
  if (config.use_conv_bias) {
    weights_.conv1d_bias = Param::vector({config.inner_size}, default_init(config.conv_size));
  }
}

MambaMixer::State MambaMixer::new_state(Device device, DType /*activation_dtype*/) const {
  return {.conv = Tensor(DType::kF32, {config_.inner_size, config_.conv_size}, device),
          .ssm = Tensor(DType::kF32, {config_.state_size, config_.inner_size}, device)};
}

void MambaMixer::forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                         std::span<State* const> states, const TensorView& hidden,
                         Saved* saved) const {
  const std::int64_t inner = config_.inner_size;
  const std::int64_t size = config_.state_size;
  ScratchScope scratch(ctx, saved != nullptr);
  ScratchScope state_scratch(ctx);
  const auto half = [&](std::int64_t begin) {
    return project(
        ctx, scratch, x, rows_of(weights_.in_proj.value, begin, inner),
        weights_.in_bias ? rows_of(weights_.in_bias->value, begin, inner) : ConstTensorView{});
  };
  const TensorView input = half(0);  // [T, E]
  const TensorView z = half(inner);  // [T, E]
  const TensorView mixed =
      convolve(ctx, scratch, input, weights_.conv1d, value_of(weights_.conv1d_bias), sequences,
               state_pointers(ctx, state_scratch, sequences, states, &State::conv,
                              {inner, config_.conv_size}),
               Activation::kSilu);  // [T, E]
  const auto selected = [&](std::int64_t begin, std::int64_t count) {
    return project(ctx, scratch, mixed, rows_of(weights_.x_proj.value, begin, count));
  };
  const TensorView low_rank = selected(0, config_.dt_rank);     // [T, R]
  const TensorView b = selected(config_.dt_rank, size);         // [T, N]
  const TensorView c = selected(config_.dt_rank + size, size);  // [T, N]
  const TensorView dt =
      project(ctx, scratch, low_rank, weights_.dt_proj.value, {}, DType::kF32);  // [T, E]

  const TensorView y = scratch.activation(mixed.shape);  // [T, E]
  ops::selective_scan(ctx, {.x = mixed,
                            .dt = dt,
                            .dt_bias = weights_.dt_bias.value,
                            .a_log = weights_.a_log.value,
                            .b = b,
                            .c = c,
                            .d = weights_.d.value,
                            .gate = z,
                            .sequences = sequences,
                            .states = state_pointers(ctx, state_scratch, sequences, states,
                                                     &State::ssm, {size, inner}),
                            .y = y});
  add_output(ctx, y, weights_.out_proj, value_of(weights_.out_bias), hidden);
  if (saved == nullptr) return;
  *saved = {.input = input,
            .z = z,
            .mixed = mixed,
            .low_rank = low_rank,
            .b = b,
            .c = c,
            .dt = dt,
            .y = y};
}

void MambaMixer::backward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                          const Saved& saved, const TensorView& dy, const TensorView& dx,
                          Gradients& gradients) const {
  ScratchScope scratch(ctx);
  const TensorView d_y = scratch.like(saved.y);  // [T, E]
  ops::linear_backward(ctx, {.dy = dy,
                             .x = saved.y,
                             .w = weights_.out_proj.value,
                             .dx = d_y,
                             .dw = gradients.sum_of(weights_.out_proj),
                             .dbias = gradients.of(weights_.out_bias)});
  const TensorView dmixed = scratch.like(saved.mixed);  // [T, E]
  const TensorView ddt = scratch.like(saved.dt);        // [T, E]
  const TensorView db = scratch.like(saved.b);          // [T, N]
  const TensorView dc = scratch.like(saved.c);          // [T, N]
  const TensorView dz = scratch.like(saved.z);          // [T, E]
  ops::selective_scan_backward(ctx, {.x = saved.mixed,
                                     .dt = saved.dt,
                                     .dt_bias = weights_.dt_bias.value,
                                     .a_log = weights_.a_log.value,
                                     .b = saved.b,
                                     .c = saved.c,
                                     .d = weights_.d.value,
                                     .gate = saved.z,
                                     .sequences = sequences,
                                     .dy = d_y,
                                     .dx = dmixed,
                                     .ddt = ddt,
                                     .d_dt_bias = gradients.of(weights_.dt_bias),
                                     .d_a_log = gradients.of(weights_.a_log),
                                     .db = db,
                                     .dc = dc,
                                     .dd = gradients.of(weights_.d),
                                     .dgate = dz});
  const TensorView dlow_rank = scratch.like(saved.low_rank);  // [T, R]
  ops::linear_backward(ctx, {.dy = ddt,
                             .x = saved.low_rank,
                             .w = weights_.dt_proj.value,
                             .dx = dlow_rank,
                             .dw = gradients.sum_of(weights_.dt_proj)});
  const auto through_selection = [&](std::int64_t begin, const TensorView& d) {
    ops::linear_backward(
        ctx, {.dy = d,
              .x = saved.mixed,
              .w = rows_of(weights_.x_proj.value, begin, d.shape[1]),
              .dx = dmixed,
              .accumulate_dx = true,
              .dw = rows_of(gradients.zeroed(ctx, weights_.x_proj), begin, d.shape[1])});
  };
  through_selection(0, dlow_rank);
  through_selection(config_.dt_rank, db);
  through_selection(config_.dt_rank + config_.state_size, dc);
  const TensorView dinput = scratch.like(saved.input);  // [T, E]
  convolve_backward(ctx, saved.input, weights_.conv1d, weights_.conv1d_bias, sequences,
                    Activation::kSilu, dmixed, dinput, gradients);
  const auto through_half = [&](std::int64_t begin, const TensorView& d) {
    const TensorView dbias = gradients.of(weights_.in_bias);
    ops::linear_backward(
        ctx, {.dy = d,
              .x = x,
              .w = rows_of(weights_.in_proj.value, begin, d.shape[1]),
              .dx = dx,
              .accumulate_dx = begin > 0,
              .dw = rows_of(gradients.zeroed(ctx, weights_.in_proj), begin, d.shape[1]),
              .dbias = weights_.in_bias ? rows_of(dbias, begin, d.shape[1]) : TensorView{}});
  };
  through_half(0, dinput);
  through_half(config_.inner_size, dz);
}

}  // namespace deltafox
