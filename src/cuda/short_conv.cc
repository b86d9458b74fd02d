#include "ops/short_conv.h"

#include "core/error.h"
#include "cuda/batches.h"
#include "cuda/short_conv_kernels.h"
#include "cuda/stream.h"

namespace deltafox::cuda {

void short_conv(Context& ctx, const ShortConvArgs& args) {
  if (args.y.dtype != args.x.dtype) fail("short_conv: CUDA needs x and y of one dtype");
  // Only the block of a sequence's first rows reads the state.
  if (args.w.shape[1] > kShortConvRows) {
    fail("short_conv: CUDA convolves at most {} inputs, not {}", kShortConvRows, args.w.shape[1]);
  }
  const ShortConvProblem problem{
      .x = args.x.data,
      .w = args.w.f32(),
      .bias = static_cast<const float*>(args.bias.data),
      .y = args.y.data,
      .is_bf16 = args.x.dtype == DType::kBF16,
      .channels = static_cast<int>(args.x.shape[1]),
      .width = static_cast<int>(args.w.shape[1]),
      .activation = args.activation,
  };
  for_each_batch(
      args.sequences, args.states,
      [](int length) { return (length + kShortConvRows - 1) / kShortConvRows; },
      [&](const SequenceBatch& batch) { launch_short_conv(problem, batch, stream_of(ctx)); });
}

}  // namespace deltafox::cuda
