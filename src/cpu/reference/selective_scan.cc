#include "ops/selective_scan.h"

#include <algorithm>
#include <cmath>
#include <vector>

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

void selective_scan_backward(const SelectiveScanBackwardArgs& args) {
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t size = args.a_log.shape[1];
  std::fill(args.db.f32(), args.db.f32() + args.db.shape.size(), 0.0F);
  std::fill(args.dc.f32(), args.dc.f32() + args.dc.shape.size(), 0.0F);
  using Row = std::vector<double>;  // [N]
  for (std::int64_t task = 0; task < args.sequences.count() * channels; ++task) {
    const std::int64_t s = task / channels;
    const std::int64_t i = task % channels;
    const auto raw = [&](std::int64_t t) {
      return static_cast<double>(args.dt.f32()[t * channels + i]) + args.dt_bias.f32()[i];
    };
    const auto step = [&](std::int64_t t) {
      return std::max(raw(t), 0.0) + std::log1p(std::exp(-std::abs(raw(t))));
    };
    const auto rate = [&](std::int64_t n) {
      return std::exp(static_cast<double>(args.a_log.f32()[i * size + n]));
    };
    std::vector<Row> states{Row(static_cast<std::size_t>(size))};
    for (std::int64_t t = args.sequences.begin(s); t < args.sequences.end(s); ++t) {
      Row state = states.back();
      for (std::int64_t n = 0; n < size; ++n) {
        double& h = state[static_cast<std::size_t>(n)];
        h = std::exp(-rate(n) * step(t)) * h +
            step(t) * args.b.f32()[t * size + n] * args.x.f32()[t * channels + i];
      }
      states.push_back(std::move(state));
    }
    Row dh(static_cast<std::size_t>(size));
    for (std::int64_t t = args.sequences.end(s) - 1; t >= args.sequences.begin(s); --t) {
      const Row& before = states[static_cast<std::size_t>(t - args.sequences.begin(s))];
      const Row& after = states[static_cast<std::size_t>(t - args.sequences.begin(s)) + 1];
      const double x = args.x.f32()[t * channels + i];
      const double dt = step(t);
      double dy = args.dy.f32()[t * channels + i];
      if (args.gate.data != nullptr) {
        const float gate = args.gate.f32()[t * channels + i];
        double y = args.d.f32()[i] * x;
        for (std::int64_t n = 0; n < size; ++n) {
          y += args.c.f32()[t * size + n] * after[static_cast<std::size_t>(n)];
        }
        args.dgate.f32()[t * channels + i] =
            static_cast<float>(dy * y * activation_slope(Activation::kSilu, gate));
        dy *= activate(Activation::kSilu, gate);
      }
      double dinput = 0;  // of Δ x
      double ddt = 0;
      for (std::int64_t n = 0; n < size; ++n) {
        double& d = dh[static_cast<std::size_t>(n)];
        const double decay = std::exp(-rate(n) * dt);
        d += args.c.f32()[t * size + n] * dy;
        args.dc.f32()[t * size + n] += static_cast<float>(after[static_cast<std::size_t>(n)] * dy);
        args.db.f32()[t * size + n] += static_cast<float>(d * dt * x);
        dinput += d * args.b.f32()[t * size + n];
        const double dlog = d * before[static_cast<std::size_t>(n)] * decay * -rate(n);
        ddt += dlog;
        args.d_a_log.f32()[i * size + n] += static_cast<float>(dlog * dt);
        d *= decay;
      }
      ddt += dinput * x;
      args.dx.f32()[t * channels + i] = static_cast<float>(dinput * dt + args.d.f32()[i] * dy);
      args.dd.f32()[i] += static_cast<float>(dy * x);
      const double draw = ddt / (1 + std::exp(-raw(t)));
      args.ddt.f32()[t * channels + i] = static_cast<float>(draw);
      args.d_dt_bias.f32()[i] += static_cast<float>(draw);
    }
  }
}

}  // namespace deltafox::reference
