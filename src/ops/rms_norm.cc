#include "ops/rms_norm.h"

#include "ops/check.h"

namespace deltafox::ops {

void rms_norm(Context& ctx, const RmsNormArgs& args) {
  const OpTimer timer("rms_norm");
  const std::int64_t width = args.x.shape[1];
  if (args.w.data != nullptr) {
    const std::int64_t groups = std::max<std::int64_t>(1, args.w.shape.size() / width);
    check("rms_norm", "w", args.w, {groups * width});
    if (args.x.shape[0] % groups != 0) {
      fail("rms_norm: {} rows are not whole sets of {} groups", args.x.shape[0], groups);
    }
  }
  check_activation(ctx, "rms_norm", "y", args.y, args.x.shape);
  if (args.gate.data != nullptr) check_activation(ctx, "rms_norm", "gate", args.gate, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::rms_norm(ctx, args);
    case Device::kCuda:
      return cuda::rms_norm(ctx, args);
  }
}

void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args) {
  const OpTimer timer("rms_norm_backward");
  const std::int64_t width = args.x.shape[1];
  if (args.w.data != nullptr) {
    const std::int64_t groups = std::max<std::int64_t>(1, args.w.shape.size() / width);
    check("rms_norm_backward", "w", args.w, {groups * width});
    if (args.x.shape[0] % groups != 0) {
      fail("rms_norm_backward: {} rows are not whole sets of {} groups", args.x.shape[0], groups);
    }
  }
  check_activation(ctx, "rms_norm_backward", "dy", args.dy, args.x.shape);
  check("rms_norm_backward", "dx", args.dx, args.x.shape, args.x.dtype);
  if (args.x.dtype != DType::kF32)
    check("rms_norm_backward", "dy", args.dy, args.dy.shape, args.x.dtype);
  if (args.rounded.data != nullptr) {
    check("rms_norm_backward", "rounded", args.rounded, args.x.shape, DType::kBF16);
  }
  if (args.dw.data != nullptr) check("rms_norm_backward", "dw", args.dw, args.w.shape);
  if (args.gate.data != nullptr) {
    check("rms_norm_backward", "gate", args.gate, args.x.shape, args.dy.dtype);
    check("rms_norm_backward", "dgate", args.dgate, args.x.shape, args.dy.dtype);
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::rms_norm_backward(ctx, args);
    case Device::kCuda:
      return cuda::rms_norm_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
