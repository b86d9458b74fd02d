#include "ops/rms_norm.h"

#include "ops/check.h"

namespace deltafox::ops {

void rms_norm(Context& ctx, const RmsNormArgs& args) {
  const std::int64_t width = args.x.shape[1];
  if (args.w.data != nullptr) {
    const std::int64_t groups = std::max<std::int64_t>(1, args.w.shape.size() / width);
    check("rms_norm", "w", args.w, {groups * width});
    if (args.x.shape[0] % groups != 0) {
      fail("rms_norm: {} rows are not whole sets of {} groups", args.x.shape[0], groups);
    }
  }
  check("rms_norm", "y", args.y, args.x.shape);
  if (args.gate.data != nullptr) check("rms_norm", "gate", args.gate, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::rms_norm(ctx, args);
    case Device::kCuda:
      return cuda::rms_norm(ctx, args);
  }
}

}  // namespace deltafox::ops
