// Which way a sequence takes is a matter of its own length, so what it gets does not depend on who
// shares its batch.
#include "ops/gla.h"

#include "core/error.h"
#include "cuda/batches.h"
#include "cuda/decayed_kernels.h"
#include "cuda/stream.h"
#include "ops/step.h"

namespace deltafox::cuda {

void gla(Context& ctx, const GlaArgs& args) {
  if (args.q.shape[2] > kLargestStateRows) {
    fail("gla: CUDA keeps at most {} keys a head, not {}", kLargestStateRows, args.q.shape[2]);
  }
  if (args.v.dtype != args.q.dtype || args.o.dtype != args.q.dtype) {
    fail("gla: CUDA needs q, v and o of one dtype");
  }
  const GlaProblem problem{
      .q = args.q.data,
      .k = args.k.f32(),
      .g = args.g.f32(),
      .v = args.v.data,
      .o = args.o.data,
      .is_bf16 = args.q.dtype == DType::kBF16,
      .heads = static_cast<int>(args.q.shape[1]),
      .key_dim = static_cast<int>(args.q.shape[2]),
      .value_dim = static_cast<int>(args.v.shape[2]),
  };
  const bool on_tensor_cores = problem.is_bf16 && gla_bf16_fits(problem.key_dim, problem.value_dim);
  const int chunk = on_tensor_cores ? kGlaBf16Chunk : kDecayedChunk;
  const auto chunks = [&](int length) { return (length + chunk - 1) / chunk; };
  const auto chunked = [](int length) { return length >= 2 * kDecayedChunk; };
  for_each_batch(
      args.sequences, args.states, [&](int length) { return chunked(length) ? chunks(length) : 0; },
      [&](const SequenceBatch& batch) {
        on_tensor_cores ? launch_gla_bf16(ctx, problem, batch)
                        : launch_gla_chunks(ctx, problem, batch);
      });
  for_each_batch(
      args.sequences, args.states, [&](int length) { return chunked(length) ? 0 : 1; },
      [&](const SequenceBatch& batch) { launch_gla(ctx, problem, batch); });
}

void gla_step(Context& ctx, const GlaStepArgs& args) {
  if (args.q.shape[2] > kLargestStateRows) {
    fail("gla_step: CUDA keeps at most {} keys a head, not {}", kLargestStateRows, args.q.shape[2]);
  }
  run_step_program(ctx);  // what comes before
  const GlaStepProblem problem{
      .q = args.q.f32(),
      .f = args.f.f32(),
      .v = args.v.f32(),
      .o = args.o.f32(),
      .heads = static_cast<int>(args.q.shape[1]),
      .key_dim = static_cast<int>(args.q.shape[2]),
      .value_dim = static_cast<int>(args.v.shape[2]),
  };
  SequenceBatch batch;
  for (std::size_t b = 0; b < args.states.size(); ++b) {
    batch.add(args.states[b], static_cast<int>(b), 1, 1);
  }
  launch_gla_step(ctx, problem, batch);
}

void gla_backward(Context& ctx, const GlaBackwardArgs& args) {
  bool on_tensor_cores =
      gla_bf16_fits(static_cast<int>(args.q.shape[2]), static_cast<int>(args.v.shape[2]));
  for (const DType dtype :
       {args.q.dtype, args.v.dtype, args.d_o.dtype, args.dq.dtype, args.dv.dtype}) {
    on_tensor_cores = on_tensor_cores && dtype == DType::kBF16;
  }
  on_tensor_cores ? launch_gla_backward_bf16(ctx, args) : launch_gla_backward_f32(ctx, args);
}

}  // namespace deltafox::cuda
