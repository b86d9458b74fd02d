#include "ops/linear.h"

#include "ops/check.h"

namespace deltafox::ops {

void linear(Context& ctx, const LinearArgs& args) {
  check("linear", "x", args.x, {args.x.shape[0], args.w.shape[1]});
  check("linear", "y", args.y, {args.x.shape[0], args.w.shape[0]});
  if (args.bias.data != nullptr) check("linear", "bias", args.bias, {args.w.shape[0]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::linear(ctx, args);
    case Device::kCuda:
      return cuda::linear(ctx, args);
  }
}

}  // namespace deltafox::ops
