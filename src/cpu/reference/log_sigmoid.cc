#include "ops/log_sigmoid.h"

#include <cmath>

namespace deltafox::reference {

void log_sigmoid(const LogSigmoidArgs& args) {
  const std::int64_t heads = args.y.shape[1];
  for (std::int64_t i = 0; i < args.y.shape.size(); ++i) {
    double x = args.x.data != nullptr ? args.x.f32()[i] : 0;
    if (args.bias.data != nullptr) x += args.bias.f32()[i % heads];
    args.y.f32()[i] = static_cast<float>(std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))));
  }
}

void log_sigmoid_backward(const LogSigmoidBackwardArgs& args) {
  const std::int64_t heads = args.y.shape[1];
  for (std::int64_t h = 0; h < heads; ++h) {
    double sum = 0;
    for (std::int64_t i = h; i < args.y.shape.size(); i += heads) {
      const double dx = args.dy.f32()[i] * -std::expm1(static_cast<double>(args.y.f32()[i]));
      if (args.dx.data != nullptr) args.dx.f32()[i] = static_cast<float>(dx);
      sum += dx;
    }
    if (args.dbias.data != nullptr) args.dbias.f32()[h] += static_cast<float>(sum);
  }
}

}  // namespace deltafox::reference
