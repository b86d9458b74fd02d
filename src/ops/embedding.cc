#include "ops/embedding.h"

#include "ops/check.h"

namespace deltafox::ops {

void embedding(Context& ctx, const EmbeddingArgs& args) {
  const OpTimer timer("embedding");
  const auto tokens = static_cast<std::int64_t>(args.ids.size());
  check("embedding", "y", args.y, {tokens, args.table.shape[1]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::embedding(ctx, args);
    case Device::kCuda:
      return cuda::embedding(ctx, args);
  }
}

void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args) {
  const OpTimer timer("embedding_backward");
  const auto tokens = static_cast<std::int64_t>(args.ids.size());
  check_activation(ctx, "embedding_backward", "dy", args.dy, {tokens, args.dtable.shape[1]});
  check("embedding_backward", "dtable", args.dtable, {args.dtable.shape[0], args.dtable.shape[1]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::embedding_backward(ctx, args);
    case Device::kCuda:
      return cuda::embedding_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
