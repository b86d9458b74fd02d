#include "ops/adamw.h"

#include <cmath>

namespace deltafox::reference {

void adamw(const AdamWArgs& args) {
  const auto t = static_cast<double>(args.step);
  const double step_size = args.lr / (1 - std::pow(args.beta1, t));
  const double root = std::sqrt(1 - std::pow(args.beta2, t));
  for (std::int64_t i = 0; i < args.w.shape.size(); ++i) {
    const double g = args.scale * args.grad.f32()[i];
    float& w = args.w.f32()[i];
    float& m = args.m.f32()[i];
    float& v = args.v.f32()[i];
    m = static_cast<float>(m + (1 - args.beta1) * (g - m));
    v = static_cast<float>(args.beta2 * v + (1 - args.beta2) * g * g);
    w = static_cast<float>(w * (1 - args.lr * args.weight_decay) -
                           step_size * m / (std::sqrt(v) / root + args.eps));
  }
}

}  // namespace deltafox::reference
