#include "model/blocks/mlp.h"

#include "ops/linear.h"
#include "ops/rms_norm.h"

namespace deltafox {

Mlp::Mlp(const Config& config)
    : config_(config),
      weights_{
          .norm = std::nullopt,
          .gate_proj =
              Param::matrix({2 * config.intermediate_size, config.hidden_size}, config.gate_init),
          .down_proj =
              Param::matrix({config.hidden_size, config.intermediate_size}, config.down_init),
      } {
  if (config.norm_first) weights_.norm = Param::vector({config.hidden_size}, Init::constant(1));
}

void Mlp::forward(Context& ctx, const ConstTensorView& x, const TensorView& hidden) const {
  const std::int64_t tokens = x.shape[0];
  ScratchScope scratch(ctx);
  ConstTensorView input = x;  // [T, C]
  if (weights_.norm) {
    const TensorView normed = scratch.tensor(x.shape);
    ops::rms_norm(ctx, {.x = x, .w = weights_.norm->value, .y = normed, .eps = config_.norm_eps});
    input = normed;
  }
  const TensorView gate_up = scratch.tensor({tokens, 2 * config_.intermediate_size});
  const TensorView product = scratch.tensor({tokens, config_.intermediate_size});
  ops::linear(ctx, {.x = input, .w = weights_.gate_proj.value, .y = gate_up});
  ops::glu(ctx, {.activation = config_.activation, .gate_up = gate_up, .y = product});
  ops::linear(ctx, {.x = product, .w = weights_.down_proj.value, .y = hidden, .accumulate = true});
}

}  // namespace deltafox
