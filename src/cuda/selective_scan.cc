#include "ops/selective_scan.h"

#include "core/error.h"
#include "cuda/batches.h"
#include "cuda/check.h"
#include "cuda/selective_scan_kernels.h"
#include "cuda/stream.h"

namespace deltafox::cuda {

void selective_scan(Context& ctx, const SelectiveScanArgs& args) {
  const DType dtype = args.x.dtype;
  const bool gated = args.gate.data != nullptr;
  if (args.b.dtype != dtype || args.c.dtype != dtype || args.y.dtype != dtype ||
      (gated && args.gate.dtype != dtype)) {
    fail("selective_scan: CUDA needs x, b, c, gate and y of one dtype");
  }
  if (args.a_log.shape[1] > kMaxScanStates) {
    fail("selective_scan: CUDA has at most {} states, not {}", kMaxScanStates, args.a_log.shape[1]);
  }
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
  for_each_batch(
      args.sequences, args.states, [](int) { return 1; },
      [&](const SequenceBatch& batch) {
        launch_selective_scan(problem, batch, stream_of(ctx));
        check_launch("selective_scan");
      });
}

}  // namespace deltafox::cuda
