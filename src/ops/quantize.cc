#include "ops/quantize.h"

#include "ops/check.h"

namespace deltafox::ops {

void quantize(Context& ctx, const QuantizeArgs& args) {
  check("quantize", "packed", args.packed, args.w.shape, args.packed.dtype);
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::quantize(ctx, args);
    case Device::kCuda:
      fail_on_cuda("quantize");
  }
}

}  // namespace deltafox::ops
