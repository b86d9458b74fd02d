#include "ops/gla.h"

#include <cmath>

namespace deltafox::reference {

void gla(const GlaArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t key_dim = args.q.shape[2];
  const std::int64_t value_dim = args.v.shape[2];
  const float scale = 1 / std::sqrt(static_cast<float>(key_dim));
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    for (std::int64_t t = args.sequences.begin(b); t < args.sequences.end(b); ++t) {
      for (std::int64_t h = 0; h < heads; ++h) {
        float* state =
            args.states[static_cast<std::size_t>(b)] + h * key_dim * value_dim;  // [K, V]
        const float* q = args.q.f32() + (t * heads + h) * key_dim;
        const float* k = args.k.f32() + (t * heads + h) * key_dim;
        const float* g = args.g.f32() + (t * heads + h) * key_dim;
        const float* v = args.v.f32() + (t * heads + h) * value_dim;
        float* o = args.o.f32() + (t * heads + h) * value_dim;
        for (std::int64_t j = 0; j < value_dim; ++j) {
          float sum = 0;
          for (std::int64_t i = 0; i < key_dim; ++i) {
            float& s = state[i * value_dim + j];
            s = g[i] * s + k[i] * v[j];
            sum += s * q[i];
          }
          o[j] = sum * scale;
        }
      }
    }
  }
}

}  // namespace deltafox::reference
