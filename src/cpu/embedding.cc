#include "ops/embedding.h"

#include <cstring>

#include "core/float_convert.h"
#include "ops/quantize.h"

namespace deltafox::cpu {

void embedding(Context& ctx, const EmbeddingArgs& args) {
  const std::int64_t width = args.table.shape[1];
  const auto tokens = static_cast<std::int64_t>(args.ids.size());
  ctx.threads().parallel_for(tokens, [&](std::int64_t t) {
    const std::int64_t row = args.ids[static_cast<std::size_t>(t)];
    float* y = args.y.f32() + t * width;
    if (is_packed(args.table.dtype)) {
      dequantize_row(args.table, row, y);
    } else {
      to_f32(args.table, row * width, {y, static_cast<std::size_t>(width)});
    }
  });
}

}  // namespace deltafox::cpu
