// Elementwise functions of the blocks.
#pragma once

#include "core/context.h"

namespace deltafox {

enum class Activation : std::uint8_t { kIdentity, kSilu, kSigmoid, kRelu, kEluPlusOne };

// x = act(x), in place
struct ActivationArgs {
  Activation activation = Activation::kIdentity;
  TensorView x;  // any shape, F32
};

// y = act(gate) · up, with gate and up the halves of each row of gate_up
struct GluArgs {
  Activation activation = Activation::kSilu;
  ConstTensorView gate_up;  // [T, 2F]
  TensorView y;             // [T, F]
};

// g = sigmoid(x) in place of x, and k = 1 − g: computed as sigmoid(−x), which keeps its precision
// where g is near one
struct ForgetGateArgs {
  TensorView x;  // any shape, F32
  TensorView k;  // the same shape
};

enum class FeatureNorm : std::uint8_t { kNone, kL2, kSum };

// x = norm(act(x)) over the last dimension, in place: l2 is x · rsqrt(Σx² + 1e-6), sum is x / Σx
struct FeatureMapArgs {
  Activation activation = Activation::kIdentity;
  FeatureNorm norm = FeatureNorm::kL2;
  TensorView x;  // [T, H, D]
};

namespace ops {
void activation(Context& ctx, const ActivationArgs& args);
void glu(Context& ctx, const GluArgs& args);
void forget_gate(Context& ctx, const ForgetGateArgs& args);
void feature_map(Context& ctx, const FeatureMapArgs& args);
}  // namespace ops
namespace cpu {
void activation(Context& ctx, const ActivationArgs& args);
void glu(Context& ctx, const GluArgs& args);
void forget_gate(Context& ctx, const ForgetGateArgs& args);
void feature_map(Context& ctx, const FeatureMapArgs& args);
}  // namespace cpu
namespace cuda {
void activation(Context& ctx, const ActivationArgs& args);
void glu(Context& ctx, const GluArgs& args);
void forget_gate(Context& ctx, const ForgetGateArgs& args);
void feature_map(Context& ctx, const FeatureMapArgs& args);
}  // namespace cuda
namespace reference {
float activate(Activation activation, float x);
void activation(const ActivationArgs& args);
void glu(const GluArgs& args);
void forget_gate(const ForgetGateArgs& args);
void feature_map(const FeatureMapArgs& args);
}  // namespace reference
}  // namespace deltafox
