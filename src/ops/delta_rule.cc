#include "ops/delta_rule.h"

#include "ops/check.h"
#include "ops/delta_mixer.h"

namespace deltafox::ops {

void delta_rule(Context& ctx, const DeltaRuleArgs& args) {
  const OpTimer timer("delta_rule");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.q.shape[1];
  check_activation(ctx, "delta_rule", "q", args.q, {tokens, heads, args.q.shape[2]});
  check_activation(ctx, "delta_rule", "k", args.k, args.q.shape);
  check_activation(ctx, "delta_rule", "v", args.v, {tokens, heads, args.v.shape[2]});
  check_activation(ctx, "delta_rule", "o", args.o, args.v.shape);
  if (args.beta.data != nullptr) check("delta_rule", "beta", args.beta, {tokens, heads});
  if (args.norm.data != nullptr) check("delta_rule", "norm", args.norm, {args.v.shape[2]});
  if (args.inputs != nullptr) {
    check_delta_inputs(ctx, *args.inputs);
    if (args.inputs->q.data != args.q.data || args.inputs->k.data != args.k.data ||
        args.inputs->v.data != args.v.data || args.inputs->beta.data != args.beta.data ||
        args.inputs->sequences.count() != args.sequences.count()) {
      fail("delta_rule: its inputs are not what delta_inputs gives");
    }
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::delta_rule(ctx, args);
    case Device::kCuda:
      return cuda::delta_rule(ctx, args);
  }
}

void delta_rule_backward(Context& ctx, const DeltaRuleBackwardArgs& args) {
  const OpTimer timer("delta_rule_backward");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.q.shape[1];
  check_activation(ctx, "delta_rule_backward", "q", args.q, {tokens, heads, args.q.shape[2]});
  check_activation(ctx, "delta_rule_backward", "k", args.k, args.q.shape);
  check_activation(ctx, "delta_rule_backward", "v", args.v, {tokens, heads, args.v.shape[2]});
  check_activation(ctx, "delta_rule_backward", "d_o", args.d_o, args.v.shape);
  check_activation(ctx, "delta_rule_backward", "dq", args.dq, args.q.shape);
  check_activation(ctx, "delta_rule_backward", "dk", args.dk, args.q.shape);
  check_activation(ctx, "delta_rule_backward", "dv", args.dv, args.v.shape);
  if (args.beta.data != nullptr) {
    check("delta_rule_backward", "beta", args.beta, {tokens, heads});
    check("delta_rule_backward", "dbeta", args.dbeta, {tokens, heads});
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::delta_rule_backward(ctx, args);
    case Device::kCuda:
      return cuda::delta_rule_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
