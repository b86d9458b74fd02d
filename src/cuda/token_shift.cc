#include "ops/token_shift.h"

#include "core/error.h"
#include "cuda/batches.h"
#include "cuda/check.h"
#include "cuda/stream.h"
#include "cuda/token_shift_kernels.h"

namespace deltafox::cuda {

void token_shift(Context& ctx, const TokenShiftArgs& args) {
  if (args.y.dtype != args.x.dtype) fail("token_shift: CUDA needs x and y of one dtype");
  const TokenShiftProblem problem{
      .x = args.x.data,
      .alpha = args.alpha.f32(),
      .y = args.y.data,
      .is_bf16 = args.x.dtype == DType::kBF16,
      .heads = static_cast<int>(args.x.shape[1]),
      .dim = static_cast<int>(args.x.shape[2]),
  };
  for_each_batch(
      args.sequences, args.states,
      [](int length) { return (length + kTokenShiftRows - 1) / kTokenShiftRows; },
      [&](const SequenceBatch& batch) {
        launch_token_shift(problem, batch, stream_of(ctx));
        check_launch("token_shift");
      });
}

void token_shift_backward(Context& ctx, const TokenShiftBackwardArgs& args) {
  if (args.dy.dtype != args.x.dtype || args.dx.dtype != args.x.dtype) {
    fail("token_shift_backward: CUDA needs x, dy and dx of one dtype");
  }
  const TokenShiftBackwardProblem problem{
      .x = args.x.data,
      .alpha = args.alpha.f32(),
      .dy = args.dy.data,
      .dx = args.dx.data,
      .dalpha = args.dalpha.f32(),
      .is_bf16 = args.x.dtype == DType::kBF16,
      .heads = static_cast<int>(args.x.shape[1]),
      .dim = static_cast<int>(args.x.shape[2]),
  };
  for_each_batch(
      args.sequences, {},
      [](int length) { return (length + kTokenShiftRows - 1) / kTokenShiftRows; },
      [&](const SequenceBatch& batch) {
        launch_token_shift_backward(problem, batch, stream_of(ctx));
        check_launch("token_shift_backward");
      });
}

}  // namespace deltafox::cuda
