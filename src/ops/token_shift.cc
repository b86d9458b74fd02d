#include "ops/token_shift.h"

#include "ops/check.h"

namespace deltafox::ops {

void token_shift(Context& ctx, const TokenShiftArgs& args) {
  const OpTimer timer("token_shift");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.x.shape[1];
  check_activation(ctx, "token_shift", "x", args.x, {tokens, heads, args.x.shape[2]});
  check("token_shift", "alpha", args.alpha, {tokens, heads});
  check_activation(ctx, "token_shift", "y", args.y, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::token_shift(ctx, args);
    case Device::kCuda:
      return cuda::token_shift(ctx, args);
  }
}

void token_shift_backward(Context& ctx, const TokenShiftBackwardArgs& args) {
  const OpTimer timer("token_shift_backward");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.x.shape[1];
  check_activation(ctx, "token_shift_backward", "x", args.x, {tokens, heads, args.x.shape[2]});
  check("token_shift_backward", "alpha", args.alpha, {tokens, heads});
  check_activation(ctx, "token_shift_backward", "dy", args.dy, args.x.shape);
  check_activation(ctx, "token_shift_backward", "dx", args.dx, args.x.shape);
  check("token_shift_backward", "dalpha", args.dalpha, args.alpha.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::token_shift_backward(ctx, args);
    case Device::kCuda:
      return cuda::token_shift_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
