#include "ops/rope.h"

#include <cmath>

namespace deltafox::reference {

void rope(const RopeArgs& args) {
  const std::int64_t dim = args.q.shape[2];
  const std::int64_t half = dim / 2;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    for (std::int64_t t = args.sequences.begin(b); t < args.sequences.end(b); ++t) {
      const std::int64_t position =
          args.positions[static_cast<std::size_t>(b)] + t - args.sequences.begin(b);
      for (const TensorView& x : {args.q, args.k}) {
        for (std::int64_t h = 0; h < x.shape[1]; ++h) {
          float* head = x.f32() + (t * x.shape[1] + h) * dim;
          for (std::int64_t i = 0; i < half; ++i) {
            const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
            const auto power =
                static_cast<float>(std::pow(static_cast<double>(args.base), exponent));
            const float angle = static_cast<float>(position) * (1 / power);
            const double cosine = std::cos(static_cast<double>(angle));
            const double sine = std::sin(static_cast<double>(angle));
            const float a = head[i];
            const float c = head[i + half];
            head[i] = static_cast<float>(a * cosine - c * sine);
            head[i + half] = static_cast<float>(a * sine + c * cosine);
          }
        }
      }
    }
  }
}

}  // namespace deltafox::reference
