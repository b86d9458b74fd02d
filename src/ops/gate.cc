#include "ops/gate.h"

#include "ops/check.h"

namespace deltafox::ops {

void gate(Context& ctx, const GateArgs& args) {
  const OpTimer timer("gate");
  check_activation(ctx, "gate", "gate", args.gate, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::gate(ctx, args);
    case Device::kCuda:
      return cuda::gate(ctx, args);
  }
}

void gate_backward(Context& ctx, const GateBackwardArgs& args) {
  const OpTimer timer("gate_backward");
  check_activation(ctx, "gate_backward", "x", args.x, args.gate.shape);
  check_activation(ctx, "gate_backward", "dy", args.dy, args.gate.shape);
  check_activation(ctx, "gate_backward", "dx", args.dx, args.gate.shape);
  check_activation(ctx, "gate_backward", "dgate", args.dgate, args.gate.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::gate_backward(ctx, args);
    case Device::kCuda:
      return cuda::gate_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
