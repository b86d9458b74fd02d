#include "ops/linear.h"

#include "ops/check.h"

namespace deltafox::ops {

void linear(Context& ctx, const LinearArgs& args) {
  const OpTimer timer("linear");
  check_activation(ctx, "linear", "x", args.x, {args.x.shape[0], args.w.shape[1]});
  check_activation(ctx, "linear", "y", args.y, {args.x.shape[0], args.w.shape[0]});
  if (args.bias.data != nullptr) check("linear", "bias", args.bias, {args.w.shape[0]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::linear(ctx, args);
    case Device::kCuda:
      return cuda::linear(ctx, args);
  }
}

void linear_backward(Context& ctx, const LinearBackwardArgs& args) {
  const Shape outputs{args.x.shape[0], args.w.shape[0]};
  check("linear_backward", "w", args.w, {args.w.shape[0], args.w.shape[1]});
  check("linear_backward", "x", args.x, {args.x.shape[0], args.w.shape[1]});
  check("linear_backward", "dy", args.dy, outputs);
  if (args.dx.data != nullptr) check("linear_backward", "dx", args.dx, args.x.shape);
  if (args.dw.data != nullptr) check("linear_backward", "dw", args.dw, args.w.shape);
  if (args.dbias.data != nullptr) check("linear_backward", "dbias", args.dbias, {args.w.shape[0]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::linear_backward(ctx, args);
    case Device::kCuda:
      fail_on_cuda("linear_backward");
  }
}

}  // namespace deltafox::ops
