#include "ops/selective_scan.h"

#include "ops/check.h"

namespace deltafox::ops {

void selective_scan(Context& ctx, const SelectiveScanArgs& args) {
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t size = args.a_log.shape[1];
  check("selective_scan", "x", args.x, {tokens, channels});
  check("selective_scan", "dt", args.dt, args.x.shape);
  check("selective_scan", "dt_bias", args.dt_bias, {channels});
  check("selective_scan", "a_log", args.a_log, {channels, size});
  check("selective_scan", "b", args.b, {tokens, size});
  check("selective_scan", "c", args.c, {tokens, size});
  check("selective_scan", "d", args.d, {channels});
  if (args.gate.data != nullptr) check("selective_scan", "gate", args.gate, args.x.shape);
  check("selective_scan", "y", args.y, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::selective_scan(ctx, args);
    case Device::kCuda:
      return cuda::selective_scan(ctx, args);
  }
}

}  // namespace deltafox::ops
