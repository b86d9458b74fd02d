#include "ops/linear.h"

#include "ops/check.h"

namespace deltafox::ops {
namespace {

// [rows, columns], on a GPU with rows of at least `columns`.
Shape shape_of_rows(const Context& ctx, const ConstTensorView& view, std::int64_t rows,
                    std::int64_t columns) {
  const bool longer = ctx.device() == Device::kCuda && view.shape.rank() == 2;
  return {rows, longer ? std::max(columns, view.shape[1]) : columns};
}

}  // namespace

void linear(Context& ctx, const LinearArgs& args) {
  const OpTimer timer("linear");
  check_activation(ctx, "linear", "x", args.x, {args.x.shape[0], args.w.shape[1]});
  check_activation(ctx, "linear", "y", args.y,
                   shape_of_rows(ctx, args.y, args.x.shape[0], args.w.shape[0]));
  if (args.bias.data != nullptr) check("linear", "bias", args.bias, {args.w.shape[0]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::linear(ctx, args);
    case Device::kCuda:
      return cuda::linear(ctx, args);
  }
}

void linear_glu(Context& ctx, const LinearGluArgs& args) {
  const std::int64_t rows = args.x.shape[0];
  check_activation(ctx, "linear_glu", "x", args.x, {rows, args.w.shape[1]});
  if (args.gate_up.data != nullptr) {
    check_activation(ctx, "linear_glu", "gate_up", args.gate_up, {rows, args.w.shape[0]});
  }
  if (args.y.data != nullptr) {
    check_activation(ctx, "linear_glu", "y", args.y, {rows, args.w.shape[0] / 2});
  }
  {
    const OpTimer timer("linear_glu");
    const bool in_one_pass = ctx.device() == Device::kCuda
                                 ? cuda::linear_glu(ctx, args)
                                 : args.gate_up.data == nullptr && cpu::linear_glu(ctx, args);
    if (in_one_pass) return;
  }
  ScratchScope scratch(ctx);
  const TensorView gate_up =
      args.gate_up.data != nullptr ? args.gate_up : scratch.activation({rows, args.w.shape[0]});
  linear(ctx, {.x = args.x, .w = args.w, .y = gate_up});
  if (args.y.data == nullptr) return;
  glu(ctx, {.activation = args.activation, .gate_up = gate_up, .y = args.y});
}

void linear_backward(Context& ctx, const LinearBackwardArgs& args) {
  const OpTimer timer("linear_backward");
  const std::int64_t outputs = args.w.shape[0];
  // On a CPU activations are F32 whatever w is.
  const bool rounded = ctx.device() == Device::kCpu && args.w.dtype == DType::kBF16;
  check("linear_backward", "w", args.w, {outputs, args.w.shape[1]},
        rounded ? DType::kBF16 : args.x.dtype);
  check_activation(ctx, "linear_backward", "x", args.x, {args.x.shape[0], args.w.shape[1]});
  check_activation(ctx, "linear_backward", "dy", args.dy,
                   shape_of_rows(ctx, args.dy, args.x.shape[0], outputs));
  if (args.dx.data != nullptr) {
    check_activation(ctx, "linear_backward", "dx", args.dx, args.x.shape);
  }
  if (args.dw.data != nullptr) check("linear_backward", "dw", args.dw, args.w.shape);
  if (args.dbias.data != nullptr) check("linear_backward", "dbias", args.dbias, {outputs});
  switch (ctx.device()) {
    case Device::kCpu:
      if (args.dw.begins) ctx.zero(args.dw.data, bytes_of(args.dw.dtype, args.dw.shape));
      return cpu::linear_backward(ctx, args);
    case Device::kCuda:
      return cuda::linear_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
