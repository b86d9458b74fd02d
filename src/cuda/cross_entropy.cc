// Labels and loss lie in the host's memory, so this one waits for its work.
#include "ops/cross_entropy.h"

#include "cuda/check.h"
#include "cuda/cross_entropy_kernels.h"
#include "cuda/stream.h"

namespace deltafox::cuda {

void cross_entropy(Context& ctx, const CrossEntropyArgs& args) {
  if (args.labels.empty()) return;
  ScratchScope scratch(ctx);
  const auto rows = static_cast<std::int64_t>(args.labels.size());
  const TensorView labels = scratch.tensor({rows}, DType::kI32);
  const TensorView loss = scratch.tensor({rows});
  ctx.copy(labels.data, args.labels.data(), args.labels.size_bytes());
  launch_cross_entropy_piece({.logits = args.logits.data,
                              .is_bf16 = args.logits.dtype == DType::kBF16,
                              .rows = static_cast<std::int32_t>(rows),
                              .first = 0,
                              .count = static_cast<std::int32_t>(args.logits.shape[1]),
                              .last = true,
                              .labels = static_cast<const std::int32_t*>(labels.data),
                              .states = nullptr,
                              .loss = loss.f32()},
                             stream_of(ctx));
  check_launch("cross_entropy");
  ctx.copy(args.loss.data(), loss.data, args.loss.size_bytes());
  ctx.synchronize();
}

}  // namespace deltafox::cuda
