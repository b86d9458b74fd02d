#include "ops/rms_norm.h"

#include <cmath>

namespace deltafox::reference {

void rms_norm(const RmsNormArgs& args) {
  const std::int64_t width = args.x.shape[1];
  for (std::int64_t r = 0; r < args.x.shape[0]; ++r) {
    const float* x = args.x.f32() + r * width;
    const auto gate = [&](std::int64_t i) {
      if (args.gate.data == nullptr) return 1.0;
      return static_cast<double>(activate(args.gate_activation, args.gate.f32()[r * width + i]));
    };
    const auto input = [&](std::int64_t i) { return args.gate_first ? x[i] * gate(i) : x[i]; };
    double squares = 0;
    for (std::int64_t i = 0; i < width; ++i) squares += input(i) * input(i);
    const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + args.eps);
    for (std::int64_t i = 0; i < width; ++i) {
      double y = input(i) * scale;
      if (args.w.data != nullptr) y *= args.w.f32()[r * width % args.w.shape[0] + i];
      if (!args.gate_first) y *= gate(i);
      args.y.f32()[r * width + i] = static_cast<float>(y);
    }
  }
}

}  // namespace deltafox::reference
