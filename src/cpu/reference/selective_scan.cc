#include "ops/selective_scan.h"

#include <algorithm>
#include <cmath>

#include "ops/activation.h"

namespace deltafox::reference {

void selective_scan(const SelectiveScanArgs& args) {
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t size = args.a_log.shape[1];
  for (std::int64_t s = 0; s < args.sequences.count(); ++s) {
    float* state = args.states[static_cast<std::size_t>(s)];  // [N, C]
    for (std::int64_t t = args.sequences.begin(s); t < args.sequences.end(s); ++t) {
      for (std::int64_t i = 0; i < channels; ++i) {
        const double raw = args.dt.f32()[t * channels + i] + args.dt_bias.f32()[i];
        const auto dt =
            static_cast<float>(std::max(raw, 0.0) + std::log1p(std::exp(-std::abs(raw))));
        const float x = args.x.f32()[t * channels + i];
        float sum = args.d.f32()[i] * x;
        for (std::int64_t n = 0; n < size; ++n) {
          float& h = state[n * channels + i];
          h = std::exp(-std::exp(args.a_log.f32()[i * size + n]) * dt) * h +
              dt * args.b.f32()[t * size + n] * x;
          sum += args.c.f32()[t * size + n] * h;
        }
        if (args.gate.data != nullptr) {
          sum *= activate(Activation::kSilu, args.gate.f32()[t * channels + i]);
        }
        args.y.f32()[t * channels + i] = sum;
      }
    }
  }
}

}  // namespace deltafox::reference
