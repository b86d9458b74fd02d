#include "ops/short_conv.h"

#include "ops/check.h"

namespace deltafox::ops {

void short_conv(Context& ctx, const ShortConvArgs& args) {
  const std::int64_t channels = args.x.shape[1];
  check("short_conv", "x", args.x, {args.sequences.tokens(), channels});
  check("short_conv", "w", args.w, {channels, args.w.shape[1]});
  check("short_conv", "y", args.y, args.x.shape);
  if (args.bias.data != nullptr) check("short_conv", "bias", args.bias, {channels});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::short_conv(ctx, args);
    case Device::kCuda:
      return cuda::short_conv(ctx, args);
  }
}

}  // namespace deltafox::ops
