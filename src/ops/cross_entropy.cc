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
  const OpTimer timer("cross_entropy_backward");
  const auto tokens = static_cast<std::int64_t>(args.labels.size());
  const std::int64_t columns = args.logits.shape[1];
  check_activation(ctx, "cross_entropy_backward", "logits", args.logits, {tokens, columns});
  if (args.classes < 0 || args.classes > columns) {
    fail("cross_entropy_backward: {} classes in {} columns", args.classes, columns);
  }
  if (ctx.device() == Device::kCpu && args.classes != 0 && args.classes != columns) {
    fail("cross_entropy_backward: rows longer than {} classes are for a GPU", args.classes);
  }
  if (args.loss.size() != args.labels.size()) {
    fail("cross_entropy_backward: {} labels and room for {} losses", args.labels.size(),
         args.loss.size());
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::cross_entropy_backward(ctx, args);
    case Device::kCuda:
      return cuda::cross_entropy_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
