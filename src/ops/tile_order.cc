#include "ops/tile_order.h"

#include "ops/check.h"

namespace deltafox::ops {

bool prefers_tiles(const Context& ctx, const Shape& shape) {
  return ctx.device() == Device::kCpu && cpu::prefers_tiles(shape);
}

void arrange_in_tiles(Context& ctx, const TensorView& w) {
  check("arrange_in_tiles", "w", w, w.shape, DType::kBF16);
  if (w.shape[1] % kTileOrderColumns != 0) fail("arrange_in_tiles: {} columns", w.shape[1]);
  if (ctx.device() == Device::kCuda) fail_on_cuda("arrange_in_tiles");
  cpu::arrange_in_tiles(ctx, w);
}

void copy_from_tiles(const ConstTensorView& w, std::uint16_t* to) {
  check("copy_from_tiles", "w", w, w.shape, DType::kBF16Tiles);
  cpu::copy_from_tiles(w, to);
}

}  // namespace deltafox::ops
