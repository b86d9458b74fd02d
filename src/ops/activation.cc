#include "ops/activation.h"

#include "ops/check.h"

namespace deltafox::ops {

void activation(Context& ctx, const ActivationArgs& args) {
  const OpTimer timer("activation");
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::activation(ctx, args);
    case Device::kCuda:
      return cuda::activation(ctx, args);
  }
}

void glu(Context& ctx, const GluArgs& args) {
  const OpTimer timer("glu");
  check_activation(ctx, "glu", "gate_up", args.gate_up, {args.y.shape[0], 2 * args.y.shape[1]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::glu(ctx, args);
    case Device::kCuda:
      return cuda::glu(ctx, args);
  }
}

void forget_gate(Context& ctx, const ForgetGateArgs& args) {
  const OpTimer timer("forget_gate");
  check("forget_gate", "k", args.k, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::forget_gate(ctx, args);
    case Device::kCuda:
      return cuda::forget_gate(ctx, args);
  }
}

void feature_map(Context& ctx, const FeatureMapArgs& args) {
  const OpTimer timer("feature_map");
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::feature_map(ctx, args);
    case Device::kCuda:
      return cuda::feature_map(ctx, args);
  }
}

void activation_backward(Context& ctx, const ActivationBackwardArgs& args) {
  const OpTimer timer("activation_backward");
  check_activation(ctx, "activation_backward", "dy", args.dy, args.x.shape);
  check_activation(ctx, "activation_backward", "dx", args.dx, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::activation_backward(ctx, args);
    case Device::kCuda:
      return cuda::activation_backward(ctx, args);
  }
}

void glu_backward(Context& ctx, const GluBackwardArgs& args) {
  const OpTimer timer("glu_backward");
  check_activation(ctx, "glu_backward", "gate_up", args.gate_up,
                   {args.dy.shape[0], 2 * args.dy.shape[1]});
  check_activation(ctx, "glu_backward", "dgate_up", args.dgate_up, args.gate_up.shape);
  if (args.y.data != nullptr) check_activation(ctx, "glu_backward", "y", args.y, args.dy.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::glu_backward(ctx, args);
    case Device::kCuda:
      return cuda::glu_backward(ctx, args);
  }
}

void forget_gate_backward(Context& ctx, const ForgetGateBackwardArgs& args) {
  const OpTimer timer("forget_gate_backward");
  check_activation(ctx, "forget_gate_backward", "k", args.k, args.g.shape);
  check_activation(ctx, "forget_gate_backward", "dg", args.dg, args.g.shape);
  check_activation(ctx, "forget_gate_backward", "dk", args.dk, args.g.shape);
  check_activation(ctx, "forget_gate_backward", "dx", args.dx, args.g.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::forget_gate_backward(ctx, args);
    case Device::kCuda:
      return cuda::forget_gate_backward(ctx, args);
  }
}

void feature_map_backward(Context& ctx, const FeatureMapBackwardArgs& args) {
  const OpTimer timer("feature_map_backward");
  check_activation(ctx, "feature_map_backward", "dy", args.dy, args.x.shape);
  check_activation(ctx, "feature_map_backward", "dx", args.dx, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::feature_map_backward(ctx, args);
    case Device::kCuda:
      return cuda::feature_map_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
