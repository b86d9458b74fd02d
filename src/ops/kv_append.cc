#include "ops/kv_append.h"

#include "ops/check.h"

namespace deltafox::ops {

void kv_append(Context& ctx, const KvAppendArgs& args) {
  const OpTimer timer("kv_append");
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const KvCache& cache = *args.caches[static_cast<std::size_t>(b)];
    const KvLayout& layout = cache.layout();
    check_activation(ctx, "kv_append", "k", args.k,
                     {args.sequences.tokens(), layout.kv_heads, layout.head_dim});
    check_activation(ctx, "kv_append", "v", args.v, args.k.shape);
    if (layout.gate_heads > 0) {
      check("kv_append", "log_gates", args.log_gates, {args.sequences.tokens(), layout.gate_heads});
    }
    if (cache.length() < args.sequences.length(b)) {
      fail("kv_append: cache {} has no room for {} tokens", b, args.sequences.length(b));
    }
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::kv_append(ctx, args);
    case Device::kCuda:
      return cuda::kv_append(ctx, args);
  }
}

}  // namespace deltafox::ops
