#include "ops/short_conv.h"

#include "ops/check.h"

namespace deltafox::ops {

void short_conv(Context& ctx, const ShortConvArgs& args) {
  const OpTimer timer("short_conv");
  const std::int64_t channels = args.x.shape[1];
  check_activation(ctx, "short_conv", "x", args.x, {args.sequences.tokens(), channels});
  check("short_conv", "w", args.w, {channels, args.w.shape[1]});
  check_activation(ctx, "short_conv", "y", args.y, args.x.shape);
  if (args.bias.data != nullptr) check("short_conv", "bias", args.bias, {channels});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::short_conv(ctx, args);
    case Device::kCuda:
      return cuda::short_conv(ctx, args);
  }
}

void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args) {
  const OpTimer timer("short_conv_backward");
  const std::int64_t channels = args.x.shape[1];
  check_activation(ctx, "short_conv_backward", "x", args.x, {args.sequences.tokens(), channels});
  check("short_conv_backward", "w", args.w, {channels, args.w.shape[1]});
  if (args.bias.data != nullptr) check("short_conv_backward", "bias", args.bias, {channels});
  check_activation(ctx, "short_conv_backward", "dy", args.dy, args.x.shape);
  check_activation(ctx, "short_conv_backward", "dx", args.dx, args.x.shape);
  if (args.dw.data != nullptr) check("short_conv_backward", "dw", args.dw, args.w.shape);
  if (args.dbias.data != nullptr) check("short_conv_backward", "dbias", args.dbias, {channels});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::short_conv_backward(ctx, args);
    case Device::kCuda:
      return cuda::short_conv_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
