#include "ops/cross_entropy.h"

#include "ops/check.h"

namespace deltafox::ops {

void cross_entropy(Context& ctx, const CrossEntropyArgs& args) {
  check("cross_entropy", "logits", args.logits,
        {static_cast<std::int64_t>(args.labels.size()), args.logits.shape[1]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::cross_entropy(ctx, args);
    case Device::kCuda:
      return cuda::cross_entropy(ctx, args);
  }
}

}  // namespace deltafox::ops
