#include "ops/rope.h"

#include "ops/check.h"

namespace deltafox::ops {

void rope(Context& ctx, const RopeArgs& args) {
  const OpTimer timer("rope");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t dim = args.q.shape[2];
  check_activation(ctx, "rope", "q", args.q, {tokens, args.q.shape[1], dim});
  check_activation(ctx, "rope", "k", args.k, {tokens, args.k.shape[1], dim});
  if (dim % 2 != 0) fail("rope: head size {} is odd", dim);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::rope(ctx, args);
    case Device::kCuda:
      return cuda::rope(ctx, args);
  }
}

void rope_backward(Context& ctx, const RopeBackwardArgs& args) {
  const OpTimer timer("rope_backward");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t dim = args.dq.shape[2];
  check_activation(ctx, "rope_backward", "dq", args.dq, {tokens, args.dq.shape[1], dim});
  check_activation(ctx, "rope_backward", "dk", args.dk, {tokens, args.dk.shape[1], dim});
  if (dim % 2 != 0) fail("rope_backward: head size {} is odd", dim);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::rope_backward(ctx, args);
    case Device::kCuda:
      return cuda::rope_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
