#include "ops/activation.h"

#include <cmath>

namespace deltafox::reference {

float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kIdentity:
      return x;
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-x));
    case Activation::kRelu:
      return x > 0 ? x : 0;
    case Activation::kEluPlusOne:
      return x > 0 ? x + 1 : std::exp(x);
  }
  return x;
}

void activation(const ActivationArgs& args) {
  for (std::int64_t i = 0; i < args.x.shape.size(); ++i) {
    args.x.f32()[i] = activate(args.activation, args.x.f32()[i]);
  }
}

void glu(const GluArgs& args) {
  const std::int64_t width = args.y.shape[1];
  for (std::int64_t t = 0; t < args.y.shape[0]; ++t) {
    const float* gate = args.gate_up.f32() + t * 2 * width;
    for (std::int64_t i = 0; i < width; ++i) {
      args.y.f32()[t * width + i] = activate(args.activation, gate[i]) * gate[width + i];
    }
  }
}

void forget_gate(const ForgetGateArgs& args) {
  for (std::int64_t i = 0; i < args.x.shape.size(); ++i) {
    const float x = args.x.f32()[i];
    args.x.f32()[i] = activate(Activation::kSigmoid, x);
    args.k.f32()[i] = activate(Activation::kSigmoid, -x);
  }
}

void feature_map(const FeatureMapArgs& args) {
  const std::int64_t width = args.x.shape[2];
  for (std::int64_t r = 0; r < args.x.shape[0] * args.x.shape[1]; ++r) {
    float* row = args.x.f32() + r * width;
    double sum = 0;
    double squares = 0;
    for (std::int64_t i = 0; i < width; ++i) {
      row[i] = activate(args.activation, row[i]);
      sum += row[i];
      squares += static_cast<double>(row[i]) * row[i];
    }
    double scale = 1;
    if (args.norm == FeatureNorm::kL2) scale = 1 / std::sqrt(squares + 1e-6);
    if (args.norm == FeatureNorm::kSum) scale = 1 / sum;
    for (std::int64_t i = 0; i < width; ++i) row[i] = static_cast<float>(row[i] * scale);
  }
}

}  // namespace deltafox::reference
