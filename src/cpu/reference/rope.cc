#include "ops/rope.h"

#include <cmath>

namespace deltafox::reference {
namespace {

// In float32 by definition.
double angle_at(std::int64_t position, std::int64_t i, std::int64_t dim, float base) {
  const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
  const auto power = static_cast<float>(std::pow(static_cast<double>(base), exponent));
  return static_cast<double>(static_cast<float>(position) * (1 / power));
}

}  // namespace

void rope(const RopeArgs& args) {
  const std::int64_t dim = args.q.shape[2];
  const std::int64_t half = dim / 2;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    for (std::int64_t t = args.sequences.begin(b); t < args.sequences.end(b); ++t) {
      const std::int64_t position =
          args.positions[static_cast<std::size_t>(b)] + t - args.sequences.begin(b);
      for (const TensorView& x : {args.q, args.k}) {
        for (std::int64_t h = 0; h < x.shape[1]; ++h) {
          float* head = x.f32() + (t * x.shape[1] + h) * dim;
          for (std::int64_t i = 0; i < half; ++i) {
            const double angle = angle_at(position, i, dim, args.base);
            const double cosine = std::cos(angle);
            const double sine = std::sin(angle);
            const float a = head[i];
            const float c = head[i + half];
            head[i] = static_cast<float>(a * cosine - c * sine);
            head[i + half] = static_cast<float>(a * sine + c * cosine);
          }
        }
      }
    }
  }
}

void rope_backward(const RopeBackwardArgs& args) {
  const std::int64_t dim = args.dq.shape[2];
  const std::int64_t half = dim / 2;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    for (std::int64_t t = args.sequences.begin(b); t < args.sequences.end(b); ++t) {
      const std::int64_t position =
          args.positions[static_cast<std::size_t>(b)] + t - args.sequences.begin(b);
      for (const TensorView& d : {args.dq, args.dk}) {
        for (std::int64_t i = 0; i < d.shape[1] * half; ++i) {
          float* head = d.f32() + (t * d.shape[1] + i / half) * dim;
          const double angle = angle_at(position, i % half, dim, args.base);
          const double a = head[i % half];
          const double c = head[i % half + half];
          head[i % half] = static_cast<float>(a * std::cos(angle) + c * std::sin(angle));
          head[i % half + half] = static_cast<float>(c * std::cos(angle) - a * std::sin(angle));
        }
      }
    }
  }
}

}  // namespace deltafox::reference
