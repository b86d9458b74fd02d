#include "ops/cross_entropy.h"

#include "ops/check.h"

namespace deltafox::ops {

void cross_entropy(Context& ctx, const CrossEntropyArgs& args) {
  const OpTimer timer("cross_entropy");
  check("cross_entropy", "logits", args.logits,
        {static_cast<std::int64_t>(args.labels.size()), args.logits.shape[1]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::cross_entropy(ctx, args);
    case Device::kCuda:
      return cuda::cross_entropy(ctx, args);
  }
}

void cross_entropy_backward(Context& ctx, const CrossEntropyBackwardArgs& args) {
  const auto tokens = static_cast<std::int64_t>(args.labels.size());
  check("cross_entropy_backward", "logits", args.logits, {tokens, args.logits.shape[1]});
  if (args.loss.size() != args.labels.size()) {
    fail("cross_entropy_backward: {} labels and room for {} losses", args.labels.size(),
         args.loss.size());
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::cross_entropy_backward(ctx, args);
    case Device::kCuda:
      fail_on_cuda("cross_entropy_backward");
  }
}

}  // namespace deltafox::ops
