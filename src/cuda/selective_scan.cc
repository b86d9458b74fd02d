// Which way a sequence takes is a matter of its own length, so what it gets does not depend on who
// shares its batch.
#include "ops/selective_scan.h"

#include "core/error.h"
#include "cuda/batches.h"
#include "cuda/check.h"
#include "cuda/selective_scan_kernels.h"
#include "cuda/stream.h"

namespace deltafox::cuda {
namespace {

void check_states(const char* op, std::int64_t states) {
  if (states > kMaxScanStates) {
    fail("{}: CUDA has at most {} states, not {}", op, kMaxScanStates, states);
  }
}

}  // namespace

void selective_scan(Context& ctx, const SelectiveScanArgs& args) {
  const DType dtype = args.x.dtype;
  const bool gated = args.gate.data != nullptr;
  if (args.b.dtype != dtype || args.c.dtype != dtype || args.y.dtype != dtype ||
      (gated && args.gate.dtype != dtype)) {
    fail("selective_scan: CUDA needs x, b, c, gate and y of one dtype");
  }
  check_states("selective_scan", args.a_log.shape[1]);
  const SelectiveScanProblem problem{
      .x = args.x.data,
      .dt = args.dt.f32(),
      .dt_bias = args.dt_bias.f32(),
      .a_log = args.a_log.f32(),
      .b = args.b.data,
      .c = args.c.data,
      .d = args.d.f32(),
      .gate = args.gate.data,
      .y = args.y.data,
      .is_bf16 = dtype == DType::kBF16,
      .channels = static_cast<int>(args.x.shape[1]),
      .states = static_cast<int>(args.a_log.shape[1]),
  };
  // Below that the chunks' three kernels take longer than the tokens one by one.
  constexpr int kLeastChunked = 256;
  const auto chunks = [&](int length) {
    return length < kLeastChunked ? 0 : selective_scan_chunks(problem.states, length);
  };
  for_each_batch(args.sequences, args.states, chunks, [&](const SequenceBatch& batch) {
    launch_selective_scan_chunks(ctx, problem, batch);
  });
  for_each_batch(
      args.sequences, args.states, [&](int length) { return chunks(length) > 0 ? 0 : 1; },
      [&](const SequenceBatch& batch) {
        launch_selective_scan(problem, batch, stream_of(ctx));
        check_launch("selective_scan");
      });
}

void selective_scan_backward(Context& ctx, const SelectiveScanBackwardArgs& args) {
  check_states("selective_scan_backward", args.a_log.shape[1]);
  launch_selective_scan_backward(ctx, args);
}

}  // namespace deltafox::cuda
