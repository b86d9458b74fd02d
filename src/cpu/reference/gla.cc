#include "ops/gla.h"

#include <algorithm>
#include <cmath>
#include <vector>

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

void gla_backward(const GlaBackwardArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t key_dim = args.q.shape[2];
  const std::int64_t value_dim = args.v.shape[2];
  const double scale = 1 / std::sqrt(static_cast<double>(key_dim));
  std::fill(args.dv.f32(), args.dv.f32() + args.dv.shape.size(), 0.0F);
  // Rows of the state do not depend on one another.
  for (std::int64_t task = 0; task < args.sequences.count() * heads * key_dim; ++task) {
    const std::int64_t b = task / key_dim / heads;
    const std::int64_t i = task % key_dim;
    const auto row = [&](std::int64_t t) {
      return (args.sequences.begin(b) + t) * heads + task / key_dim % heads;
    };
    using Row = std::vector<double>;  // [V]
    std::vector<Row> states{Row(static_cast<std::size_t>(value_dim))};
    for (std::int64_t t = 0; t < args.sequences.length(b); ++t) {
      Row state = states.back();
      for (std::int64_t j = 0; j < value_dim; ++j) {
        double& s = state[static_cast<std::size_t>(j)];
        s = args.g.f32()[row(t) * key_dim + i] * s +
            static_cast<double>(args.k.f32()[row(t) * key_dim + i]) *
                args.v.f32()[row(t) * value_dim + j];
      }
      states.push_back(std::move(state));
    }
    Row ds(static_cast<std::size_t>(value_dim));
    for (std::int64_t t = args.sequences.length(b) - 1; t >= 0; --t) {
      const std::int64_t at = row(t) * key_dim + i;
      double dq = 0;
      double dk = 0;
      double dg = 0;
      for (std::int64_t j = 0; j < value_dim; ++j) {
        const double d_o = args.d_o.f32()[row(t) * value_dim + j];
        double& d = ds[static_cast<std::size_t>(j)];
        d += scale * args.q.f32()[at] * d_o;
        dq += scale * states[static_cast<std::size_t>(t) + 1][static_cast<std::size_t>(j)] * d_o;
        dk += d * args.v.f32()[row(t) * value_dim + j];
        dg += d * states[static_cast<std::size_t>(t)][static_cast<std::size_t>(j)];
        args.dv.f32()[row(t) * value_dim + j] += static_cast<float>(d * args.k.f32()[at]);
        d *= args.g.f32()[at];
      }
      args.dq.f32()[at] = static_cast<float>(dq);
      args.dk.f32()[at] = static_cast<float>(dk);
      args.dg.f32()[at] = static_cast<float>(dg);
    }
  }
}

}  // namespace deltafox::reference
