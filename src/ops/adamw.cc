#include "ops/adamw.h"

#include "ops/check.h"

namespace deltafox::ops {

void adamw(Context& ctx, const AdamWArgs& args) {
  check("adamw", "grad", args.grad, args.w.shape);
  check("adamw", "w", args.w, args.w.shape);
  check("adamw", "m", args.m, args.w.shape);
  check("adamw", "v", args.v, args.w.shape);
  if (args.step < 1) fail("adamw: step must be at least 1, got {}", args.step);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::adamw(ctx, args);
    case Device::kCuda:
      return cuda::adamw(ctx, args);
  }
}

void adamw_step(Context& ctx, const AdamWStepArgs& args) {
  const OpTimer timer("adamw_step");
  for (const AdamWParam& param : args.params) {
    check("adamw_step", "grad", param.grad, param.w.shape);
    check("adamw_step", "w", param.w, param.w.shape);
    check("adamw_step", "m", param.m, param.w.shape);
    check("adamw_step", "v", param.v, param.w.shape);
    if (param.rounded.data != nullptr) {
      check("adamw_step", "rounded", param.rounded, param.w.shape, DType::kBF16);
    }
  }
  check("adamw_step", "norm", args.norm, {1});
  if (args.step < 1) fail("adamw_step: step must be at least 1, got {}", args.step);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::adamw_step(ctx, args);
    case Device::kCuda:
      return cuda::adamw_step(ctx, args);
  }
}

double sum_of_squares(Context& ctx, const ConstTensorView& x) {
  check("sum_of_squares", "x", x, x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::sum_of_squares(ctx, x);
    case Device::kCuda:
      return cuda::sum_of_squares(ctx, x);
  }
  return 0;
}

}  // namespace deltafox::ops
