#include "ops/gla.h"

#include "ops/check.h"

namespace deltafox::ops {

void gla(Context& ctx, const GlaArgs& args) {
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.q.shape[1];
  check("gla", "q", args.q, {tokens, heads, args.q.shape[2]});
  check("gla", "k", args.k, args.q.shape);
  check("gla", "g", args.g, args.q.shape);
  check("gla", "v", args.v, {tokens, heads, args.v.shape[2]});
  check("gla", "o", args.o, args.v.shape);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::gla(ctx, args);
    case Device::kCuda:
      return cuda::gla(ctx, args);
  }
}

}  // namespace deltafox::ops
