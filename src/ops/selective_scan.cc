#include "ops/selective_scan.h"

#include "ops/check.h"

namespace deltafox::ops {

void selective_scan(Context& ctx, const SelectiveScanArgs& args) {
  const OpTimer timer("selective_scan");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t size = args.a_log.shape[1];
  check_activation(ctx, "selective_scan", "x", args.x, {tokens, channels});
  check("selective_scan", "dt", args.dt, args.x.shape);
  check("selective_scan", "dt_bias", args.dt_bias, {channels});
  check("selective_scan", "a_log", args.a_log, {channels, size});
  check_activation(ctx, "selective_scan", "b", args.b, {tokens, size});
  check_activation(ctx, "selective_scan", "c", args.c, {tokens, size});
  check("selective_scan", "d", args.d, {channels});
  if (args.gate.data != nullptr)
    check_activation(ctx, "selective_scan", "gate", args.gate, args.x.shape);
  check_activation(ctx, "selective_scan", "y", args.y, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::selective_scan(ctx, args);
    case Device::kCuda:
      return cuda::selective_scan(ctx, args);
  }
}

void selective_scan_backward(Context& ctx, const SelectiveScanBackwardArgs& args) {
  const OpTimer timer("selective_scan_backward");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t size = args.a_log.shape[1];
  const Shape inputs{tokens, channels};
  const Shape rows{tokens, size};
  check_activation(ctx, "selective_scan_backward", "x", args.x, inputs);
  check("selective_scan_backward", "dt", args.dt, inputs);
  check_activation(ctx, "selective_scan_backward", "dy", args.dy, inputs);
  check_activation(ctx, "selective_scan_backward", "dx", args.dx, inputs);
  check("selective_scan_backward", "ddt", args.ddt, inputs);
  check_activation(ctx, "selective_scan_backward", "b", args.b, rows);
  check_activation(ctx, "selective_scan_backward", "c", args.c, rows);
  check_activation(ctx, "selective_scan_backward", "db", args.db, rows);
  check_activation(ctx, "selective_scan_backward", "dc", args.dc, rows);
  check("selective_scan_backward", "dt_bias", args.dt_bias, {channels});
  check("selective_scan_backward", "d", args.d, {channels});
  check("selective_scan_backward", "d_dt_bias", args.d_dt_bias, {channels});
  check("selective_scan_backward", "dd", args.dd, {channels});
  check("selective_scan_backward", "a_log", args.a_log, {channels, size});
  check("selective_scan_backward", "d_a_log", args.d_a_log, {channels, size});
  if (args.gate.data != nullptr) {
    check_activation(ctx, "selective_scan_backward", "gate", args.gate, inputs);
    check_activation(ctx, "selective_scan_backward", "dgate", args.dgate, inputs);
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::selective_scan_backward(ctx, args);
    case Device::kCuda:
      return cuda::selective_scan_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
