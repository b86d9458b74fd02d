#include "ops/embedding.h"

#include <algorithm>
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

// A task has some columns of the table and passes by all tokens.
void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args) {
  constexpr std::int64_t kColumns = 64;
  const std::int64_t width = args.dtable.shape[1];
  ctx.threads().parallel_for((width + kColumns - 1) / kColumns, [&](std::int64_t task) {
    const std::int64_t begin = task * kColumns;
    const std::int64_t end = std::min(width, begin + kColumns);
    for (std::size_t t = 0; t < args.ids.size(); ++t) {
      const float* dy = args.dy.f32() + static_cast<std::int64_t>(t) * width;
      float* row = args.dtable.f32() + args.ids[t] * width;
      for (std::int64_t i = begin; i < end; ++i) row[i] += dy[i];
    }
  });
}

}  // namespace deltafox::cpu
