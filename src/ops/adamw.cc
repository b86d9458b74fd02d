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
      fail_on_cuda("adamw");
  }
}

double sum_of_squares(Context& ctx, const ConstTensorView& x) {
  check("sum_of_squares", "x", x, x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::sum_of_squares(ctx, x);
    case Device::kCuda:
      fail_on_cuda("sum_of_squares");
  }
  return 0;
}

}  // namespace deltafox::ops
