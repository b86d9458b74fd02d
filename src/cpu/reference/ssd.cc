#include "ops/ssd.h"

#include <algorithm>
#include <cmath>

namespace deltafox::reference {

void ssd(const SsdArgs& args) {
  const std::int64_t heads = args.y.shape[1];
  const std::int64_t head_dim = args.y.shape[2];
  const std::int64_t size = args.state_size();
  for (std::int64_t s = 0; s < args.sequences.count(); ++s) {
    for (std::int64_t t = args.sequences.begin(s); t < args.sequences.end(s); ++t) {
      const float* row = args.xbc.f32() + t * args.xbc.shape[1];
      for (std::int64_t h = 0; h < heads; ++h) {
        const std::int64_t group = h / (heads / args.num_groups);
        const float* x = row + h * head_dim;
        const float* b = row + heads * head_dim + group * size;
        const float* c = b + args.num_groups * size;
        const double raw = args.dt.f32()[t * heads + h] + args.dt_bias.f32()[h];
        const double softplus = std::max(raw, 0.0) + std::log1p(std::exp(-std::abs(raw)));
        const auto dt = static_cast<float>(std::clamp<double>(softplus, args.dt_min, args.dt_max));
        const float decay = std::exp(-std::exp(args.a_log.f32()[h]) * dt);
        float* state = args.states[static_cast<std::size_t>(s)] + h * size * head_dim;  // [N, P]
        float* y = args.y.f32() + (t * heads + h) * head_dim;
        for (std::int64_t p = 0; p < head_dim; ++p) {
          float sum = args.d.f32()[h] * x[p];
          for (std::int64_t n = 0; n < size; ++n) {
            float& entry = state[n * head_dim + p];
            entry = decay * entry + b[n] * (dt * x[p]);
            sum += c[n] * entry;
          }
          y[p] = sum;
        }
      }
    }
  }
}

}  // namespace deltafox::reference
