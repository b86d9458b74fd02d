#include "ops/forgetting_attention.h"

#include "ops/check.h"

namespace deltafox::ops {

void forgetting_attention(Context& ctx, const ForgettingAttentionArgs& args) {
  const OpTimer timer("forgetting_attention");
  const std::int64_t heads = args.q.shape[1];
  check_activation(ctx, "forgetting_attention", "o", args.o, args.q.shape);
  if (args.lse.data != nullptr) {
    check("forgetting_attention", "lse", args.lse, {args.q.shape[0], heads});
  }
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const KvCache& cache = *args.caches[static_cast<std::size_t>(b)];
    const KvLayout& layout = cache.layout();
    check_activation(ctx, "forgetting_attention", "q", args.q,
                     {args.sequences.tokens(), heads, layout.head_dim});
    if (heads % layout.kv_heads != 0) {
      fail("forgetting_attention: {} heads cannot share {} of keys", heads, layout.kv_heads);
    }
    if (layout.gate_heads != 0 && layout.gate_heads != heads) {
      fail("forgetting_attention: {} heads have {} forget gates", heads, layout.gate_heads);
    }
    if (cache.length() < args.sequences.length(b)) {
      fail("forgetting_attention: cache {} is shorter than its {} queries", b,
           args.sequences.length(b));
    }
    if (args.log_pruning_tolerance && args.score_bounds.empty() && !layout.key_norms) {
      fail("forgetting_attention: pruning needs bounds of the scores or norms of the keys");
    }
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::forgetting_attention(ctx, args);
    case Device::kCuda:
      return cuda::forgetting_attention(ctx, args);
  }
}

void forgetting_attention_backward(Context& ctx, const ForgettingAttentionBackwardArgs& args) {
  const OpTimer timer("forgetting_attention_backward");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t dim = args.q.shape[2];
  const std::int64_t kv_heads = args.k.shape[1];
  if (kv_heads < 1 || heads % kv_heads != 0) {
    fail("forgetting_attention_backward: {} heads cannot share {} of keys", heads, kv_heads);
  }
  const auto check_rows = [&](const char* name, const ConstTensorView& view, std::int64_t count) {
    check_activation(ctx, "forgetting_attention_backward", name, view, {tokens, count, dim});
  };
  check_rows("q", args.q, heads);
  check_rows("k", args.k, kv_heads);
  check_rows("v", args.v, kv_heads);
  check_rows("o", args.o, heads);
  check_rows("d_o", args.d_o, heads);
  check_rows("dq", args.dq, heads);
  check_rows("dk", args.dk, kv_heads);
  check_rows("dv", args.dv, kv_heads);
  if (args.lse.data != nullptr) {
    check("forgetting_attention_backward", "lse", args.lse, {tokens, heads});
  }
  if (args.log_gates.data != nullptr) {
    check("forgetting_attention_backward", "log_gates", args.log_gates, {tokens, heads});
    check("forgetting_attention_backward", "dlog_gates", args.dlog_gates, {tokens, heads});
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::forgetting_attention_backward(ctx, args);
    case Device::kCuda:
      return cuda::forgetting_attention_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
