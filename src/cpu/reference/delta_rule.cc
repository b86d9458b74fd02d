#include "ops/delta_rule.h"

#include <cmath>
#include <vector>

#include "ops/rms_norm.h"

namespace deltafox::reference {

void delta_rule(const DeltaRuleArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t key_dim = args.q.shape[2];
  const std::int64_t value_dim = args.v.shape[2];
  const float scale = 1 / std::sqrt(static_cast<float>(key_dim));
  std::vector<float> u(static_cast<std::size_t>(value_dim));
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    for (std::int64_t t = args.sequences.begin(b); t < args.sequences.end(b); ++t) {
      for (std::int64_t h = 0; h < heads; ++h) {
        float* state =
            args.states[static_cast<std::size_t>(b)] + h * key_dim * value_dim;  // [K, V]
        const float* q = args.q.f32() + (t * heads + h) * key_dim;
        const float* k = args.k.f32() + (t * heads + h) * key_dim;
        const float* v = args.v.f32() + (t * heads + h) * value_dim;
        float* o = args.o.f32() + (t * heads + h) * value_dim;
        const float beta = args.beta.data != nullptr ? args.beta.f32()[t * heads + h] : 1;
        for (std::int64_t j = 0; j < value_dim; ++j) {
          float recalled = 0;
          for (std::int64_t i = 0; i < key_dim; ++i) recalled += state[i * value_dim + j] * k[i];
          u[static_cast<std::size_t>(j)] = beta * (v[j] - recalled);
        }
        for (std::int64_t j = 0; j < value_dim; ++j) {
          float sum = 0;
          for (std::int64_t i = 0; i < key_dim; ++i) {
            state[i * value_dim + j] += k[i] * u[static_cast<std::size_t>(j)];
            sum += state[i * value_dim + j] * q[i];
          }
          o[j] = sum * scale;
        }
      }
    }
  }
  if (args.norm.data == nullptr) return;
  const TensorView rows = args.o.reshaped({args.sequences.tokens() * heads, value_dim});
  rms_norm({.x = rows, .w = args.norm, .y = rows, .eps = args.norm_eps});
}

void delta_rule_backward(const DeltaRuleBackwardArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t key_dim = args.q.shape[2];
  const std::int64_t value_dim = args.v.shape[2];
  const double scale = 1 / std::sqrt(static_cast<double>(key_dim));
  using Matrix = std::vector<double>;  // [K, V]
  const Matrix zeros(static_cast<std::size_t>(key_dim * value_dim));
  for (std::int64_t task = 0; task < args.sequences.count() * heads; ++task) {
    const std::int64_t b = task / heads;
    const auto row = [&](std::int64_t t) {
      return (args.sequences.begin(b) + t) * heads + task % heads;
    };
    const auto beta = [&](std::int64_t t) {
      return args.beta.data != nullptr ? args.beta.f32()[row(t)] : 1.0;
    };
    std::vector<Matrix> states{zeros};  // before each token, and at the end
    std::vector<Matrix> errors;         // v − S₋ᵀk of each token
    for (std::int64_t t = 0; t < args.sequences.length(b); ++t) {
      const float* k = args.k.f32() + row(t) * key_dim;
      Matrix state = states.back();
      Matrix error(static_cast<std::size_t>(value_dim));
      for (std::int64_t j = 0; j < value_dim; ++j) {
        double recalled = 0;
        for (std::int64_t i = 0; i < key_dim; ++i) {
          recalled += state[static_cast<std::size_t>(i * value_dim + j)] * k[i];
        }
        const double e = args.v.f32()[row(t) * value_dim + j] - recalled;
        error[static_cast<std::size_t>(j)] = e;
        for (std::int64_t i = 0; i < key_dim; ++i) {
          state[static_cast<std::size_t>(i * value_dim + j)] += k[i] * beta(t) * e;
        }
      }
      states.push_back(std::move(state));
      errors.push_back(std::move(error));
    }
    Matrix ds = zeros;
    for (std::int64_t t = args.sequences.length(b) - 1; t >= 0; --t) {
      const float* q = args.q.f32() + row(t) * key_dim;
      const float* k = args.k.f32() + row(t) * key_dim;
      const float* d_o = args.d_o.f32() + row(t) * value_dim;
      const Matrix& before = states[static_cast<std::size_t>(t)];
      const Matrix& after = states[static_cast<std::size_t>(t) + 1];
      const Matrix& error = errors[static_cast<std::size_t>(t)];
      std::vector<double> dq(static_cast<std::size_t>(key_dim));
      std::vector<double> dk(static_cast<std::size_t>(key_dim));
      double dbeta = 0;
      for (std::int64_t j = 0; j < value_dim; ++j) {
        const double u = beta(t) * error[static_cast<std::size_t>(j)];
        double du = 0;
        for (std::int64_t i = 0; i < key_dim; ++i) {
          const auto at = static_cast<std::size_t>(i * value_dim + j);
          ds[at] += scale * q[i] * d_o[j];
          du += ds[at] * k[i];
        }
        for (std::int64_t i = 0; i < key_dim; ++i) {
          const auto at = static_cast<std::size_t>(i * value_dim + j);
          dq[static_cast<std::size_t>(i)] += scale * after[at] * d_o[j];
          dk[static_cast<std::size_t>(i)] += ds[at] * u - beta(t) * before[at] * du;
          ds[at] -= beta(t) * k[i] * du;
        }
        args.dv.f32()[row(t) * value_dim + j] = static_cast<float>(beta(t) * du);
        dbeta += du * error[static_cast<std::size_t>(j)];
      }
      for (std::int64_t i = 0; i < key_dim; ++i) {
        args.dq.f32()[row(t) * key_dim + i] = static_cast<float>(dq[static_cast<std::size_t>(i)]);
        args.dk.f32()[row(t) * key_dim + i] = static_cast<float>(dk[static_cast<std::size_t>(i)]);
      }
      if (args.dbeta.data != nullptr) args.dbeta.f32()[row(t)] = static_cast<float>(dbeta);
    }
  }
}

}  // namespace deltafox::reference
