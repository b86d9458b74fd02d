#include "ops/activation.h"

#include "ops/check.h"

namespace deltafox::ops {

void activation(Context& ctx, const ActivationArgs& args) {
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::activation(ctx, args);
    case Device::kCuda:
      return cuda::activation(ctx, args);
  }
}

void glu(Context& ctx, const GluArgs& args) {
  check("glu", "gate_up", args.gate_up, {args.y.shape[0], 2 * args.y.shape[1]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::glu(ctx, args);
    case Device::kCuda:
      return cuda::glu(ctx, args);
  }
}

void forget_gate(Context& ctx, const ForgetGateArgs& args) {
  check("forget_gate", "k", args.k, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::forget_gate(ctx, args);
    case Device::kCuda:
      return cuda::forget_gate(ctx, args);
  }
}

void feature_map(Context& ctx, const FeatureMapArgs& args) {
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::feature_map(ctx, args);
    case Device::kCuda:
      return cuda::feature_map(ctx, args);
  }
}

}  // namespace deltafox::ops
