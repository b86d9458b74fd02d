#include "ops/delta_rule.h"

#include "ops/check.h"

namespace deltafox::ops {

void delta_rule(Context& ctx, const DeltaRuleArgs& args) {
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.q.shape[1];
  check("delta_rule", "q", args.q, {tokens, heads, args.q.shape[2]});
  check("delta_rule", "k", args.k, args.q.shape);
  check("delta_rule", "v", args.v, {tokens, heads, args.v.shape[2]});
  check("delta_rule", "o", args.o, args.v.shape);
  if (args.beta.data != nullptr) check("delta_rule", "beta", args.beta, {tokens, heads});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::delta_rule(ctx, args);
    case Device::kCuda:
      return cuda::delta_rule(ctx, args);
  }
}

}  // namespace deltafox::ops
