#include "ops/token_shift.h"

#include "ops/check.h"

namespace deltafox::ops {

void token_shift(Context& ctx, const TokenShiftArgs& args) {
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.x.shape[1];
  check("token_shift", "x", args.x, {tokens, heads, args.x.shape[2]});
  check("token_shift", "alpha", args.alpha, {tokens, heads});
  check("token_shift", "y", args.y, args.x.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::token_shift(ctx, args);
    case Device::kCuda:
      return cuda::token_shift(ctx, args);
  }
}

}  // namespace deltafox::ops
