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

double activation_slope(Activation activation, double x) {
  const double sigmoid = 1 / (1 + std::exp(-x));
  switch (activation) {
    case Activation::kIdentity:
      return 1;
    case Activation::kSilu:
      return sigmoid * (1 + x * (1 - sigmoid));
    case Activation::kSigmoid:
      return sigmoid * (1 - sigmoid);
    case Activation::kRelu:
      return x > 0 ? 1 : 0;
    case Activation::kEluPlusOne:
      return x > 0 ? 1 : std::exp(x);
  }
  return 1;
}

void activation_backward(const ActivationBackwardArgs& args) {
  for (std::int64_t i = 0; i < args.x.shape.size(); ++i) {
    args.dx.f32()[i] =
        static_cast<float>(args.dy.f32()[i] * activation_slope(args.activation, args.x.f32()[i]));
  }
}

void glu_backward(const GluBackwardArgs& args) {
  const std::int64_t width = args.dy.shape[1];
  if (args.y.data != nullptr) {
    glu({.activation = args.activation, .gate_up = args.gate_up, .y = args.y});
  }
  for (std::int64_t t = 0; t < args.dy.shape[0]; ++t) {
    const float* gate = args.gate_up.f32() + t * 2 * width;
    float* dgate = args.dgate_up.f32() + t * 2 * width;
    for (std::int64_t i = 0; i < width; ++i) {
      const double dy = args.dy.f32()[t * width + i];
      const float x = gate[i];
      dgate[i] = static_cast<float>(dy * gate[width + i] * activation_slope(args.activation, x));
      dgate[width + i] = static_cast<float>(dy * activate(args.activation, x));
    }
  }
}

void forget_gate_backward(const ForgetGateBackwardArgs& args) {
  for (std::int64_t i = 0; i < args.g.shape.size(); ++i) {
    const double slope = static_cast<double>(args.g.f32()[i]) * args.k.f32()[i];
    const double d = static_cast<double>(args.dg.f32()[i]) - args.dk.f32()[i];
    args.dx.f32()[i] = static_cast<float>(d * slope);
  }
}

void feature_map_backward(const FeatureMapBackwardArgs& args) {
  const std::int64_t width = args.x.shape[2];
  for (std::int64_t r = 0; r < args.x.shape[0] * args.x.shape[1]; ++r) {
    const float* x = args.x.f32() + r * width;
    const float* dy = args.dy.f32() + r * width;
    float* dx = args.dx.f32() + r * width;
    double sum = 0;
    double squares = 0;
    double dot = 0;
    for (std::int64_t i = 0; i < width; ++i) {
      const double a = activate(args.activation, x[i]);
      sum += a;
      squares += a * a;
      dot += a * dy[i];
    }
    for (std::int64_t i = 0; i < width; ++i) {
      const double a = activate(args.activation, x[i]);
      double da = dy[i];
      if (args.norm == FeatureNorm::kL2) {
        const double scale = 1 / std::sqrt(squares + 1e-6);
        da = scale * (dy[i] - a * scale * scale * dot);
      } else if (args.norm == FeatureNorm::kSum) {
        da = (dy[i] - dot / sum) / sum;
      }
      dx[i] = static_cast<float>(da * activation_slope(args.activation, x[i]));
    }
  }
}

}  // namespace deltafox::reference
