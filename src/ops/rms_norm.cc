#include "ops/rms_norm.h"

#include "ops/check.h"

namespace deltafox::ops {
namespace {

void check_weights(std::string_view op, const ConstTensorView& w, const Shape& x) {
  if (w.data == nullptr) return;
  const std::int64_t groups = std::max<std::int64_t>(1, w.shape.size() / x[1]);
  check(op, "w", w, {groups * x[1]});
  if (x[0] % groups != 0) fail("{}: {} rows are not whole sets of {} groups", op, x[0], groups);
}

}  // namespace

void rms_norm(Context& ctx, const RmsNormArgs& args) {
  const OpTimer timer("rms_norm");
  check_weights("rms_norm", args.w, args.x.shape);
  check_activation(ctx, "rms_norm", "y", args.y, args.x.shape);
  if (args.gate.data != nullptr) check_activation(ctx, "rms_norm", "gate", args.gate, args.x.shape);
  if (args.scales.data != nullptr) {
    check("rms_norm", "scales", args.scales, {args.x.shape[0]});
    if (args.gate.data != nullptr) fail("rms_norm: scales are kept without a gate only");
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::rms_norm(ctx, args);
    case Device::kCuda:
      return cuda::rms_norm(ctx, args);
  }
}

void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args) {
  const OpTimer timer("rms_norm_backward");
  const Shape& shape = args.dy.shape;
  check_weights("rms_norm_backward", args.w, shape);
  check_activation(ctx, "rms_norm_backward", "dy", args.dy, shape);
  check("rms_norm_backward", "dx", args.dx, shape,
        args.dx.dtype == args.dy.dtype ? args.dy.dtype : DType::kF32);
  if (args.x.data != nullptr) {
    check("rms_norm_backward", "x", args.x, shape, args.dx.dtype);
  } else {
    check("rms_norm_backward", "y", args.y, shape, args.dy.dtype);
    check("rms_norm_backward", "scales", args.scales, {shape[0]});
    if (args.gate.data != nullptr) fail("rms_norm_backward: with a gate, x is needed");
  }
  if (args.rounded.data != nullptr) {
    check("rms_norm_backward", "rounded", args.rounded, shape, DType::kBF16);
  }
  if (args.dw.data != nullptr) check("rms_norm_backward", "dw", args.dw, args.w.shape);
  if (args.gate.data != nullptr) {
    check("rms_norm_backward", "gate", args.gate, shape, args.dy.dtype);
    check("rms_norm_backward", "dgate", args.dgate, shape, args.dy.dtype);
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::rms_norm_backward(ctx, args);
    case Device::kCuda:
      return cuda::rms_norm_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
