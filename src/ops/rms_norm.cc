#include "ops/rms_norm.h"

#include "ops/check.h"

namespace deltafox::ops {

void rms_norm(Context& ctx, const RmsNormArgs& args) {
  check("rms_norm", "w", args.w, {args.x.shape[1]});
  check("rms_norm", "y", args.y, args.x.shape);
  if (args.gate.data != nullptr) check("rms_norm", "gate", args.gate, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::rms_norm(ctx, args);
  }
}

}  // namespace deltafox::ops
