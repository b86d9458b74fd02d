#include "ops/short_conv.h"

#include "core/error.h"
#include "cuda/batches.h"
#include "cuda/short_conv_kernels.h"
#include "cuda/stream.h"

namespace deltafox::cuda {

namespace {

bool is_fast(const ShortConvArgs& args) {
  const auto aligned = [](const void* data) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
  };
  return args.w.shape[1] == 4 && args.w.shape[0] % kShortConvChannels == 0 &&
         args.x.shape[1] % kShortConvChannels == 0 && aligned(args.x.data) &&
         aligned(args.y.data) && aligned(args.w.data) && aligned(args.bias.data);
}

}  // namespace

bool short_conv_has_norm(const ShortConvArgs& args) {
  const std::int64_t lanes = args.norm_width / kShortConvChannels;
  return is_fast(args) && args.norm_width > 0 && args.norm_width % kShortConvChannels == 0 &&
         lanes <= 32 && (lanes & (lanes - 1)) == 0;
}

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
      .x_stride = args.x.shape[1],
      .channels = static_cast<int>(args.w.shape[0]),
      .width = static_cast<int>(args.w.shape[1]),
      .fast = is_fast(args),
      .norm_lanes =
          short_conv_has_norm(args) ? static_cast<int>(args.norm_width / kShortConvChannels) : 0,
      .activation = args.activation,
  };
  for_each_batch(
      args.sequences, args.states,
      [](int length) { return (length + kShortConvRows - 1) / kShortConvRows; },
      [&](const SequenceBatch& batch) { launch_short_conv(problem, batch, stream_of(ctx)); });
}

}  // namespace deltafox::cuda
