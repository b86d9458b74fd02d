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

}  // namespace deltafox::reference
