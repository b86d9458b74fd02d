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

void arrange_packed(Context& ctx, const TensorView& packed) {
  if (!is_packed(packed.dtype)) fail("arrange_packed: {} is not packed", name_of(packed.dtype));
  // On the CPU matrices are read as they lie in files.
  if (ctx.device() == Device::kCuda) cuda::arrange_packed(ctx, packed);
}

}  // namespace deltafox::ops
