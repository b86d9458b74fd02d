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
    if (args.scales.data != nullptr) args.scales.f32()[r] = static_cast<float>(scale);
    for (std::int64_t i = 0; i < width; ++i) {
      double y = input(i) * scale;
      if (args.w.data != nullptr) {
        const float w = args.w.f32()[r * width % args.w.shape[0] + i];
        y *= args.scales.data != nullptr ? invertible_weight(w) : w;
      }
      if (!args.gate_first) y *= gate(i);
      args.y.f32()[r * width + i] = static_cast<float>(y);
    }
  }
}

namespace {

// From y and the scales.
void backward_of_output(const RmsNormBackwardArgs& args) {
  const std::int64_t width = args.dy.shape[1];
  std::vector<double> dw(static_cast<std::size_t>(args.w.data != nullptr ? args.w.shape[0] : 0));
  for (std::int64_t r = 0; r < args.dy.shape[0]; ++r) {
    const std::int64_t at = r * width;
    const std::int64_t group = dw.empty() ? 0 : at % args.w.shape[0];
    const auto weight = [&](std::int64_t i) {
      return dw.empty() ? 1.0 : static_cast<double>(invertible_weight(args.w.f32()[group + i]));
    };
    const auto dy = [&](std::int64_t i) { return static_cast<double>(args.dy.f32()[at + i]); };
    double dot = 0;
    for (std::int64_t i = 0; i < width; ++i) dot += dy(i) * args.y.f32()[at + i];
    for (std::int64_t i = 0; i < width; ++i) {
      const double normed = args.y.f32()[at + i] / weight(i);
      if (!dw.empty()) dw[static_cast<std::size_t>(group + i)] += dy(i) * normed;
      const double dx =
          args.scales.f32()[r] * (dy(i) * weight(i) - normed * dot / static_cast<double>(width));
      float& to = args.dx.f32()[at + i];
      to = static_cast<float>(args.accumulate_dx ? to + dx : dx);
    }
  }
  if (args.dw.data == nullptr) return;
  for (std::size_t i = 0; i < dw.size(); ++i) args.dw.f32()[i] += static_cast<float>(dw[i]);
}

}  // namespace

void rms_norm_backward(const RmsNormBackwardArgs& args) {
  if (args.x.data == nullptr) return backward_of_output(args);
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
