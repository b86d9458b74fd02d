// Which kernel a sequence takes is a matter of its own length and of the bucket of all tokens, so
// what it gets does not depend on who shares its batch.
#include "ops/ssd.h"

#include <bit>

#include "core/error.h"
#include "cuda/batches.h"
#include "cuda/decayed_kernels.h"
#include "cuda/stream.h"
#include "ops/step.h"

namespace deltafox::cuda {

void ssd(Context& ctx, const SsdArgs& args) {
  if (args.state_size() > kLargestStateRows) {
    fail("ssd: CUDA keeps states of at most {}, not {}", kLargestStateRows, args.state_size());
  }
  if (args.y.dtype != args.xbc.dtype) fail("ssd: CUDA needs xbc and y of one dtype");
  const SsdProblem problem{
      .xbc = args.xbc.data,
      .dt = args.dt.f32(),
      .dt_bias = args.dt_bias.f32(),
      .a_log = args.a_log.f32(),
      .d = args.d.f32(),
      .y = args.y.data,
      .dt_min = args.dt_min,
      .dt_max = args.dt_max,
      .is_bf16 = args.y.dtype == DType::kBF16,
      .heads = static_cast<int>(args.y.shape[1]),
      .groups = static_cast<int>(args.num_groups),
      .state_size = static_cast<int>(args.state_size()),
      .head_dim = static_cast<int>(args.y.shape[2]),
  };
  const bool chunks_fit = ssd_chunks_fit(problem);
  const auto chunked = [&](int length) { return chunks_fit && length >= kLeastChunkedRows; };
  const int multiprocessors = ctx.stream().multiprocessors();
  const auto bucket =
      static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(args.sequences.tokens())));
  for_each_batch(
      args.sequences, args.states,
      [&](int length) {
        return chunked(length) ? ssd_segments(problem, length, bucket, multiprocessors) : 0;
      },
      [&](const SequenceBatch& batch) {
        ScratchScope scratch(ctx);
        SsdSegments segments;
        if (batch.maps > 0) {
          const std::int64_t heads = std::int64_t{batch.blocks} * problem.heads;
          segments.states = scratch.tensor({heads, problem.state_size, problem.head_dim}).f32();
          segments.decays = scratch.tensor({heads}).f32();
        }
        launch_ssd_chunks(problem, segments, batch, stream_of(ctx));
      });
  for_each_batch(
      args.sequences, args.states, [&](int length) { return chunked(length) ? 0 : 1; },
      [&](const SequenceBatch& batch) { launch_ssd(ctx, problem, batch); });
}

void ssd_step(Context& ctx, const SsdStepArgs& args) {
  run_step_program(ctx);  // what comes before
  if (args.state_size() > kLargestStateRows) {
    fail("ssd_step: CUDA keeps states of at most {}, not {}", kLargestStateRows, args.state_size());
  }
  const SsdProblem problem{
      .xbc = args.xbc.data,
      .dt = args.dt.f32(),
      .dt_bias = args.dt_bias.f32(),
      .a_log = args.a_log.f32(),
      .d = args.d.f32(),
      .y = args.y.data,
      .dt_min = args.dt_min,
      .dt_max = args.dt_max,
      .is_bf16 = false,
      .heads = static_cast<int>(args.y.shape[1]),
      .groups = static_cast<int>(args.num_groups),
      .state_size = static_cast<int>(args.state_size()),
      .head_dim = static_cast<int>(args.y.shape[2]),
      .z = args.z.f32(),
  };
  SequenceBatch batch;
  for (std::size_t b = 0; b < args.states.size(); ++b) {
    batch.add(args.states[b], static_cast<int>(b), 1, 1);
  }
  launch_ssd(ctx, problem, batch);
}

}  // namespace deltafox::cuda
