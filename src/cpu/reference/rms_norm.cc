#include "ops/rms_norm.h"

#include <cmath>
#include <vector>

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

void rms_norm_backward(const RmsNormBackwardArgs& args) {
  const std::int64_t width = args.x.shape[1];
  const bool gated = args.gate.data != nullptr;
  std::vector<double> dw(static_cast<std::size_t>(args.w.data != nullptr ? args.w.shape[0] : 0));
  for (std::int64_t r = 0; r < args.x.shape[0]; ++r) {
    const std::int64_t at = r * width;
    const std::int64_t group = dw.empty() ? 0 : at % args.w.shape[0];
    const auto gate = [&](std::int64_t i) {
      return gated ? activate(args.gate_activation, args.gate.f32()[at + i]) : 1.0;
    };
    const auto before = [&](std::int64_t i) { return args.gate_first ? gate(i) : 1.0; };
    const auto after = [&](std::int64_t i) { return args.gate_first ? 1.0 : gate(i); };
    const auto weight = [&](std::int64_t i) { return dw.empty() ? 1.0 : args.w.f32()[group + i]; };
    const auto input = [&](std::int64_t i) { return args.x.f32()[at + i] * before(i); };
    double squares = 0;
    double dot = 0;
    for (std::int64_t i = 0; i < width; ++i) {
      squares += input(i) * input(i);
      dot += args.dy.f32()[at + i] * weight(i) * after(i) * input(i);
    }
    const double mean = squares / static_cast<double>(width);
    const double scale = 1 / std::sqrt(mean + args.eps);
    for (std::int64_t i = 0; i < width; ++i) {
      const double dy = args.dy.f32()[at + i];
      const double slope =
          gated ? activation_slope(args.gate_activation, args.gate.f32()[at + i]) : 0.0;
      if (!dw.empty()) {
        dw[static_cast<std::size_t>(group + i)] += dy * after(i) * input(i) * scale;
      }
      const double dinput = scale * (dy * weight(i) * after(i) -
                                     input(i) * scale * scale * dot / static_cast<double>(width));
      if (gated) {
        const double dgate =
            args.gate_first ? dinput * args.x.f32()[at + i] : dy * weight(i) * input(i) * scale;
        args.dgate.f32()[at + i] = static_cast<float>(dgate * slope);
      }
      const double dx = dinput * before(i);
      args.dx.f32()[at + i] =
          static_cast<float>(args.accumulate_dx ? args.dx.f32()[at + i] + dx : dx);
    }
  }
  if (args.dw.data == nullptr) return;
  for (std::size_t i = 0; i < dw.size(); ++i) args.dw.f32()[i] += static_cast<float>(dw[i]);
}

}  // namespace deltafox::reference
