#include "ops/rope.h"

#include <cmath>
#include <vector>

#include "core/error.h"
#include "cuda/check.h"
#include "cuda/kv_batch.h"
#include "cuda/rope_kernels.h"

namespace deltafox::cuda {

std::vector<float> rope_frequencies(std::int64_t dim, float base) {
  std::vector<float> frequencies;
  for (std::int64_t i = 0; i < dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    frequencies.push_back(1 / static_cast<float>(std::pow(static_cast<double>(base), exponent)));
  }
  return frequencies;
}

namespace {

void turn(Context& ctx, const char* op, const RopeArgs& args, bool back) {
  if (args.q.dtype != args.k.dtype) fail("{}: CUDA needs q and k of one dtype", op);
  if (args.sequences.tokens() == 0) return;
  const std::int64_t dim = args.q.shape[2];
  const std::vector<float> frequencies = rope_frequencies(dim, args.base);
  std::vector<RopeSequence> sequences;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    sequences.push_back({args.positions[static_cast<std::size_t>(b)], args.sequences.begin(b)});
  }
  RopeProblem problem{
      .q = args.q.data,
      .k = args.k.data,
      .is_bf16 = args.q.dtype == DType::kBF16,
      .heads = static_cast<int>(args.q.shape[1]),
      .kv_heads = static_cast<int>(args.k.shape[1]),
      .dim = static_cast<int>(dim),
      .back = back,
      .tokens = args.sequences.tokens(),
      .sequences = nullptr,
      .sequence_count = static_cast<int>(sequences.size()),
      .frequencies = nullptr,
      .recorded_runs = ctx.recorded_runs(),
  };
  upload_together(ctx, [&] {
    problem.sequences = upload(ctx, std::span(sequences));
    problem.frequencies = upload(ctx, std::span(frequencies));
  });
  launch_rope(problem, stream_of(ctx));
  check_launch(op);
}

}  // namespace

void rope(Context& ctx, const RopeArgs& args) {
  turn(ctx, "rope", args, false);
}

void rope_backward(Context& ctx, const RopeBackwardArgs& args) {
  turn(ctx, "rope_backward",
       {.q = args.dq,
        .k = args.dk,
        .sequences = args.sequences,
        .positions = args.positions,
        .base = args.base},
       true);
}

}  // namespace deltafox::cuda
