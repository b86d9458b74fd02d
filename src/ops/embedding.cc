#include "ops/embedding.h"

#include "ops/check.h"

namespace deltafox::ops {

void embedding(Context& ctx, const EmbeddingArgs& args) {
  const auto tokens = static_cast<std::int64_t>(args.ids.size());
  check("embedding", "y", args.y, {tokens, args.table.shape[1]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::embedding(ctx, args);
    case Device::kCuda:
      return cuda::embedding(ctx, args);
  }
}

}  // namespace deltafox::ops
