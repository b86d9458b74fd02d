#include "ops/rms_norm.h"

#include <cmath>

namespace deltafox::reference {

void rms_norm(const RmsNormArgs& args) {
  const std::int64_t width = args.x.shape[1];
  for (std::int64_t r = 0; r < args.x.shape[0]; ++r) {
    const float* x = args.x.f32() + r * width;
    double squares = 0;
    for (std::int64_t i = 0; i < width; ++i) squares += static_cast<double>(x[i]) * x[i];
    const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + args.eps);
    for (std::int64_t i = 0; i < width; ++i) {
      double y = x[i] * scale * args.w.f32()[i];
      if (args.gate.data != nullptr) {
        y *= activate(args.gate_activation, args.gate.f32()[r * width + i]);
      }
      args.y.f32()[r * width + i] = static_cast<float>(y);
    }
  }
}

}  // namespace deltafox::reference
