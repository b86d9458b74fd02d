#include "model/blocks/mlp.h"

#include "ops/gate.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"

namespace deltafox {

Mlp::Mlp(const Config& config)
    : config_(config),
      weights_{
          .norm = std::nullopt,
          .gate_proj =
              Param::matrix({2 * config.intermediate_size, config.hidden_size}, config.gate_init),
          .up_proj = std::nullopt,
          .down_proj =
              Param::matrix({config.hidden_size, config.intermediate_size}, config.down_init),
      } {
  if (config.norm_first) weights_.norm = Param::vector({config.hidden_size}, Init::constant(1));
}

void Mlp::split_gate_and_up() {
  weights_.gate_proj =
      Param::matrix({config_.intermediate_size, config_.hidden_size}, config_.gate_init);
  weights_.up_proj = weights_.gate_proj;
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
  const TensorView gate = scratch.tensor({tokens, weights_.gate_proj.shape[0]});
  const TensorView product = scratch.tensor({tokens, config_.intermediate_size});
  ops::linear(ctx, {.x = input, .w = weights_.gate_proj.value, .y = gate});
  if (weights_.up_proj) {
    ops::linear(ctx, {.x = input, .w = weights_.up_proj->value, .y = product});
    ops::gate(ctx, {.activation = config_.activation, .gate = gate, .x = product});
  } else {
    ops::glu(ctx, {.activation = config_.activation, .gate_up = gate, .y = product});
  }
  ops::linear(ctx, {.x = product, .w = weights_.down_proj.value, .y = hidden, .accumulate = true});
}

}  // namespace deltafox
