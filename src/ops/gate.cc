#include "ops/gate.h"

#include "ops/check.h"

namespace deltafox::ops {

void gate(Context& ctx, const GateArgs& args) {
  check("gate", "gate", args.gate, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::gate(ctx, args);
    case Device::kCuda:
      return cuda::gate(ctx, args);
  }
}

}  // namespace deltafox::ops
