#include "ops/ssd.h"

#include <algorithm>
#include <cmath>
#include <vector>

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

void ssd_backward(const SsdBackwardArgs& args) {
  const std::int64_t heads = args.dy.shape[1];
  const std::int64_t head_dim = args.dy.shape[2];
  const std::int64_t size = args.state_size();
  const std::int64_t width = args.xbc.shape[1];
  std::fill(args.dxbc.f32(), args.dxbc.f32() + args.dxbc.shape.size(), 0.0F);
  using Matrix = std::vector<double>;  // [N, P]
  for (std::int64_t task = 0; task < args.sequences.count() * heads; ++task) {
    const std::int64_t s = task / heads;
    const std::int64_t h = task % heads;
    const std::int64_t group = h / (heads / args.num_groups);
    const std::int64_t b_at = heads * head_dim + group * size;
    const std::int64_t c_at = b_at + args.num_groups * size;
    const double rate = std::exp(static_cast<double>(args.a_log.f32()[h]));
    const auto raw = [&](std::int64_t t) {
      return static_cast<double>(args.dt.f32()[t * heads + h]) + args.dt_bias.f32()[h];
    };
    const auto softplus = [&](std::int64_t t) {
      return std::max(raw(t), 0.0) + std::log1p(std::exp(-std::abs(raw(t))));
    };
    const auto step = [&](std::int64_t t) {
      return std::clamp<double>(softplus(t), args.dt_min, args.dt_max);
    };
    std::vector<Matrix> states{Matrix(static_cast<std::size_t>(size * head_dim))};
    for (std::int64_t t = args.sequences.begin(s); t < args.sequences.end(s); ++t) {
      const float* row = args.xbc.f32() + t * width;
      Matrix state = states.back();
      for (std::int64_t i = 0; i < size * head_dim; ++i) {
        double& entry = state[static_cast<std::size_t>(i)];
        entry = std::exp(-rate * step(t)) * entry +
                row[b_at + i / head_dim] * step(t) * row[h * head_dim + i % head_dim];
      }
      states.push_back(std::move(state));
    }
    Matrix ds(static_cast<std::size_t>(size * head_dim));
    for (std::int64_t t = args.sequences.end(s) - 1; t >= args.sequences.begin(s); --t) {
      const float* row = args.xbc.f32() + t * width;
      const float* x = row + h * head_dim;
      float* drow = args.dxbc.f32() + t * width;
      const float* dy = args.dy.f32() + (t * heads + h) * head_dim;
      const auto before = static_cast<std::size_t>(t - args.sequences.begin(s));
      const double dt = step(t);
      const double decay = std::exp(-rate * dt);
      double ddecay = 0;
      double ddt = 0;
      for (std::int64_t p = 0; p < head_dim; ++p) {
        double du = 0;
        for (std::int64_t n = 0; n < size; ++n) {
          const auto at = static_cast<std::size_t>(n * head_dim + p);
          ds[at] += static_cast<double>(row[c_at + n]) * dy[p];
          drow[c_at + n] += static_cast<float>(states[before + 1][at] * dy[p]);
          drow[b_at + n] += static_cast<float>(ds[at] * dt * x[p]);
          du += ds[at] * row[b_at + n];
          ddecay += ds[at] * states[before][at];
          ds[at] *= decay;
        }
        ddt += du * x[p];
        drow[h * head_dim + p] = static_cast<float>(dt * du + args.d.f32()[h] * dy[p]);
        args.dd.f32()[h] += dy[p] * x[p];
      }
      ddt -= rate * decay * ddecay;
      args.d_a_log.f32()[h] -= static_cast<float>(dt * rate * decay * ddecay);
      const bool clamped = softplus(t) != dt;
      const double draw = clamped ? 0 : ddt / (1 + std::exp(-raw(t)));
      args.ddt.f32()[t * heads + h] = static_cast<float>(draw);
      args.d_dt_bias.f32()[h] += static_cast<float>(draw);
    }
  }
}

}  // namespace deltafox::reference
