#include "ops/attention_step.h"

#include "ops/check.h"

namespace deltafox::ops {

void attention_step(Context& ctx, const AttentionStepArgs& args) {
  const OpTimer timer("attention_step");
  if (ctx.device() == Device::kCpu) fail("attention_step: runs on a GPU only");
  const std::int64_t batch = args.q.shape[0];
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t dim = args.q.shape[2];
  const KvLayout& layout = args.caches[0]->layout();
  const Shape keys{batch, layout.kv_heads, layout.head_dim};
  if ((dim != 64 && dim != 128) || layout.dtype != DType::kBF16 || layout.key_norms) {
    fail("attention_step: heads of {} in a cache of {} do not fit", dim, name_of(layout.dtype));
  }
  check("attention_step", "q", args.q, {batch, heads, layout.head_dim});
  check("attention_step", "k", args.k, keys);
  check("attention_step", "v", args.v, keys);
  check("attention_step", "o", args.o, {batch, heads * dim}, DType::kBF16);
  if (args.k_alpha.data != nullptr) {
    check("attention_step", "k_alpha", args.k_alpha, {batch, layout.kv_heads});
  }
  if (args.v_alpha.data != nullptr) {
    check("attention_step", "v_alpha", args.v_alpha, {batch, layout.kv_heads});
  }
  if (args.gates.data != nullptr) check("attention_step", "gates", args.gates, {batch, heads});
  if (args.output_gate.data != nullptr) {
    check("attention_step", "output_gate", args.output_gate, {batch, heads * dim});
  }
  cuda::attention_step(ctx, args);
}

}  // namespace deltafox::ops
