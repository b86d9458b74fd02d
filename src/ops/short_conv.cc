#include "ops/short_conv.h"

#include <vector>

#include "ops/activation.h"
#include "ops/check.h"

namespace deltafox::ops {
namespace {

void check_heads(std::string_view op, std::int64_t channels, std::int64_t norm_width) {
  if (channels % norm_width != 0) {
    fail("{}: {} channels are not whole heads of {}", op, channels, norm_width);
  }
}

// Where no kernel does it at once, of rows of C: the convolution once more, the norm's gradient,
// the rest.
void norm_backward(Context& ctx, ShortConvBackwardArgs args) {
  const std::int64_t tokens = args.x.shape[0];
  const std::int64_t channels = args.x.shape[1];
  const Shape heads{tokens, channels / args.norm_width, args.norm_width};
  ScratchScope scratch(ctx);
  // Sequences begin from zeros; what is left in a state is of no use.
  const auto count = static_cast<std::size_t>(args.sequences.count());
  Tensor zeros(DType::kF32, {static_cast<std::int64_t>(count), channels, args.w.shape[1]},
               ctx.device());
  std::vector<float*> states(count);
  for (std::size_t b = 0; b < count; ++b) {
    states[b] = zeros.f32() + b * static_cast<std::size_t>(args.w.shape.size());
  }
  const TensorView convolved = scratch.tensor(args.x.shape, args.x.dtype);  // [T, C]
  const TensorView dy = scratch.tensor(args.x.shape, args.dy.dtype);        // [T, C]
  short_conv(ctx, {.x = args.x,
                   .w = args.w,
                   .bias = args.bias,
                   .sequences = args.sequences,
                   .states = states,
                   .activation = args.activation,
                   .y = convolved});
  feature_map_backward(ctx, {.norm = FeatureNorm::kL2,
                             .x = convolved.reshaped(heads),
                             .dy = args.dy.reshaped(heads),
                             .dx = dy.reshaped(heads)});
  args.dy = dy;
  args.norm_width = 0;
  short_conv_backward(ctx, args);
}

}  // namespace

void short_conv(Context& ctx, const ShortConvArgs& args) {
  const OpTimer timer("short_conv");
  const std::int64_t channels = args.x.shape[1];
  check_activation(ctx, "short_conv", "x", args.x, {args.sequences.tokens(), channels});
  check("short_conv", "w", args.w, {channels, args.w.shape[1]});
  check_activation(ctx, "short_conv", "y", args.y, args.x.shape);
  if (args.bias.data != nullptr) check("short_conv", "bias", args.bias, {channels});
  if (args.norm_width > 0) check_heads("short_conv", channels, args.norm_width);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::short_conv(ctx, args);
    case Device::kCuda:
      cuda::short_conv(ctx, args);
      if (args.norm_width > 0) {
        const Shape heads{args.y.shape[0], channels / args.norm_width, args.norm_width};
        feature_map(ctx, {.norm = FeatureNorm::kL2, .x = args.y.reshaped(heads)});
      }
      return;
  }
}

void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args) {
  const OpTimer timer("short_conv_backward");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t channels = args.w.shape[0];
  const bool longer = ctx.device() == Device::kCuda && args.x.shape[1] > channels;
  check_activation(ctx, "short_conv_backward", "x", args.x,
                   {tokens, longer ? args.x.shape[1] : channels});
  check("short_conv_backward", "w", args.w, {channels, args.w.shape[1]});
  if (args.bias.data != nullptr) check("short_conv_backward", "bias", args.bias, {channels});
  check_activation(ctx, "short_conv_backward", "dy", args.dy, {tokens, channels});
  check_activation(ctx, "short_conv_backward", "dx", args.dx, args.x.shape);
  if (args.dw.data != nullptr) check("short_conv_backward", "dw", args.dw, args.w.shape);
  if (args.dbias.data != nullptr) check("short_conv_backward", "dbias", args.dbias, {channels});
  if (args.norm_width > 0) {
    check_heads("short_conv_backward", channels, args.norm_width);
    const bool at_once = ctx.device() == Device::kCuda && cuda::short_conv_backward_has_norm(args);
    if (!at_once && longer) {
      fail("short_conv_backward: heads of {} and rows of {} are not for one call", args.norm_width,
           args.x.shape[1]);
    }
    if (!at_once) return norm_backward(ctx, args);
  }
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::short_conv_backward(ctx, args);
    case Device::kCuda:
      return cuda::short_conv_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
