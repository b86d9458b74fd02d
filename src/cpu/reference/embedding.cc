#include "ops/embedding.h"

namespace deltafox::reference {

void embedding_backward(const EmbeddingBackwardArgs& args) {
  const std::int64_t width = args.dtable.shape[1];
  for (std::size_t t = 0; t < args.ids.size(); ++t) {
    const float* dy = args.dy.f32() + static_cast<std::int64_t>(t) * width;
    for (std::int64_t i = 0; i < width; ++i) args.dtable.f32()[args.ids[t] * width + i] += dy[i];
  }
}

}  // namespace deltafox::reference
