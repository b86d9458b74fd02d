#include "model/blocks/mlp.h"

#include "core/quantized.h"
#include "model/blocks/projection.h"
#include "ops/gate.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/step.h"

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

ConstTensorView Mlp::normed(Context& ctx, ScratchScope& scratch, const ConstTensorView& x) const {
  if (!weights_.norm) return x;
  const TensorView y = scratch.activation(x.shape);
  ops::rms_norm(ctx, {.x = x, .w = weights_.norm->value, .y = y, .eps = config_.norm_eps});
  return y;
}

void Mlp::forward(Context& ctx, const ConstTensorView& x, const TensorView& hidden,
                  Saved* saved) const {
  ScratchScope kept_scratch(ctx, saved != nullptr);
  ScratchScope scratch(ctx);
  const ConstTensorView input = normed(ctx, scratch, x);  // [T, C]
  Saved kept;
  TensorView product;  // [T, F]
  if (weights_.up_proj) {
    kept.gate = project(ctx, kept_scratch, input, weights_.gate_proj.value);
    kept.up = project(ctx, kept_scratch, input, weights_.up_proj->value);
    if (hidden.data != nullptr) {
      product = saved != nullptr ? copy_of(ctx, scratch, kept.up) : kept.up;
      ops::gate(ctx, {.activation = config_.activation, .gate = kept.gate, .x = product});
    }
  } else {
    if (saved != nullptr) {
      kept.gate = kept_scratch.activation({x.shape[0], 2 * config_.intermediate_size});
    }
    if (hidden.data != nullptr) {
      product = scratch.activation({x.shape[0], config_.intermediate_size});
    }
    ops::linear_glu(ctx, {.activation = config_.activation,
                          .x = input,
                          .w = weights_.gate_proj.value,
                          .gate_up = kept.gate,
                          .y = product});
  }
  if (saved != nullptr) *saved = kept;
  add_output(ctx, product, weights_.down_proj, {}, hidden);
}

bool Mlp::has_step() const {
  return !weights_.norm && !weights_.up_proj && config_.activation == Activation::kSilu &&
         weights_.gate_proj.value.dtype != DType::kF32 && weights_.gate_proj.shape[1] % 256 == 0 &&
         (!is_packed(weights_.gate_proj.value.dtype) ||
          config_.intermediate_size % kPanelRows == 0) &&
         weights_.down_proj.shape[1] % 256 == 0;
}

void Mlp::step(Context& ctx, const ConstTensorView& norm, float eps,
               const TensorView& hidden) const {
  ScratchScope scratch(ctx);
  const TensorView product = scratch.activation({hidden.shape[0], config_.intermediate_size});
  const StepLinearPart gate_up{
      .w = weights_.gate_proj.value, .y = product, .epilogue = StepEpilogue::kGlu};
  ops::step_linear(ctx, {.x = hidden, .norm = norm, .norm_eps = eps, .parts = {&gate_up, 1}});
  const StepLinearPart down{
      .w = weights_.down_proj.value, .y = hidden, .epilogue = StepEpilogue::kAdd};
  ops::step_linear(ctx, {.x = product, .parts = {&down, 1}});
}

void Mlp::backward(Context& ctx, const ConstTensorView& x, const Saved& saved, const TensorView& dy,
                   const TensorView& dx, Gradients& gradients) const {
  ScratchScope scratch(ctx);
  const TensorView product = scratch.activation({x.shape[0], config_.intermediate_size});
  const TensorView dproduct = scratch.like(product);  // [T, F]
  // Without dw only the shape of x matters: the product is not there yet.
  ops::linear_backward(ctx,
                       {.dy = dy, .x = product, .w = weights_.down_proj.value, .dx = dproduct});
  const ConstTensorView input = normed(ctx, scratch, x);                       // [T, C]
  const TensorView dinput = weights_.norm ? scratch.activation(x.shape) : dx;  // [T, C]
  const TensorView dgate =
      weights_.up_proj ? scratch.like(saved.gate) : saved.gate;  // as saved.gate
  if (weights_.up_proj) {
    ctx.copy(product.data, saved.up.data, bytes_of(product.dtype, product.shape));
    ops::gate(ctx, {.activation = config_.activation, .gate = saved.gate, .x = product});
    ops::gate_backward(ctx, {.activation = config_.activation,
                             .gate = saved.gate,
                             .x = saved.up,
                             .dy = dproduct,
                             .dx = dproduct,
                             .dgate = dgate});
    ops::linear_backward(ctx, {.dy = dproduct,
                               .x = input,
                               .w = weights_.up_proj->value,
                               .dx = dinput,
                               .dw = gradients.sum_of(weights_.up_proj)});
  } else {
    ops::glu_backward(ctx, {.activation = config_.activation,
                            .gate_up = saved.gate,
                            .dy = dproduct,
                            .dgate_up = dgate,
                            .y = product});
  }
  ops::linear_backward(ctx, {.dy = dy,
                             .x = product,
                             .w = weights_.down_proj.value,
                             .dw = gradients.sum_of(weights_.down_proj)});
  ops::linear_backward(ctx, {.dy = dgate,
                             .x = input,
                             .w = weights_.gate_proj.value,
                             .dx = dinput,
                             .accumulate_dx = weights_.up_proj.has_value(),
                             .dw = gradients.sum_of(weights_.gate_proj)});
  if (!weights_.norm) return;
  ops::rms_norm_backward(ctx, {.x = x,
                               .w = weights_.norm->value,
                               .eps = config_.norm_eps,
                               .dy = dinput,
                               .dx = dx,
                               .accumulate_dx = true,
                               .dw = gradients.of(weights_.norm)});
}

}  // namespace deltafox
