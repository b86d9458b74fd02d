#include "ops/gla.h"

#include "ops/check.h"

namespace deltafox::ops {

void gla(Context& ctx, const GlaArgs& args) {
  const OpTimer timer("gla");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.q.shape[1];
  check_activation(ctx, "gla", "q", args.q, {tokens, heads, args.q.shape[2]});
  check("gla", "k", args.k, args.q.shape);
  check("gla", "g", args.g, args.q.shape);
  check_activation(ctx, "gla", "v", args.v, {tokens, heads, args.v.shape[2]});
  check_activation(ctx, "gla", "o", args.o, args.v.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::gla(ctx, args);
    case Device::kCuda:
      return cuda::gla(ctx, args);
  }
}

void gla_step(Context& ctx, const GlaStepArgs& args) {
  const OpTimer timer("gla_step");
  if (ctx.device() == Device::kCpu) fail("gla_step: runs on a GPU only");
  const std::int64_t batch = args.q.shape[0];
  const std::int64_t heads = args.q.shape[1];
  check("gla_step", "q", args.q, {batch, heads, args.q.shape[2]});
  check("gla_step", "f", args.f, args.q.shape);
  check("gla_step", "v", args.v, {batch, heads, args.v.shape[2]});
  check("gla_step", "o", args.o, args.v.shape);
  cuda::gla_step(ctx, args);
}

void gla_backward(Context& ctx, const GlaBackwardArgs& args) {
  const OpTimer timer("gla_backward");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.q.shape[1];
  check_activation(ctx, "gla_backward", "q", args.q, {tokens, heads, args.q.shape[2]});
  check("gla_backward", "k", args.k, args.q.shape);
  check("gla_backward", "g", args.g, args.q.shape);
  check_activation(ctx, "gla_backward", "v", args.v, {tokens, heads, args.v.shape[2]});
  check_activation(ctx, "gla_backward", "d_o", args.d_o, args.v.shape);
  check_activation(ctx, "gla_backward", "dq", args.dq, args.q.shape);
  check("gla_backward", "dk", args.dk, args.q.shape);
  check("gla_backward", "dg", args.dg, args.q.shape);
  check_activation(ctx, "gla_backward", "dv", args.dv, args.v.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::gla_backward(ctx, args);
    case Device::kCuda:
      return cuda::gla_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
