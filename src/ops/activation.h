// Elementwise functions of the blocks.
//
// On a GPU each tensor is F32 or of the Context's activation dtype, gradients as well.
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

// dx = dy · act'(x)
struct ActivationBackwardArgs {
  Activation activation = Activation::kIdentity;
  ConstTensorView x;   // any shape, before the activation
  ConstTensorView dy;  // the same shape
  TensorView dx;       // the same shape, may be dy
};

struct GluBackwardArgs {
  Activation activation = Activation::kSilu;
  ConstTensorView gate_up;  // [T, 2F]
  ConstTensorView dy;       // [T, F]
  TensorView dgate_up;      // [T, 2F], =, may be gate_up
  TensorView y = {};        // [T, F], =, what glu gives, once more; or no data
};

// dx = (dg − dk) · g · k
struct ForgetGateBackwardArgs {
  ConstTensorView g;   // any shape
  ConstTensorView k;   // the same shape
  ConstTensorView dg;  // the same shape
  ConstTensorView dk;  // the same shape
  TensorView dx;       // the same shape, =, may be dg or dk
};

struct FeatureMapBackwardArgs {
  Activation activation = Activation::kIdentity;
  FeatureNorm norm = FeatureNorm::kL2;
  ConstTensorView x;   // [T, H, D], before the map
  ConstTensorView dy;  // [T, H, D]
  TensorView dx;       // [T, H, D], =, may be dy
};

namespace ops {
void activation(Context& ctx, const ActivationArgs& args);
void glu(Context& ctx, const GluArgs& args);
void forget_gate(Context& ctx, const ForgetGateArgs& args);
void feature_map(Context& ctx, const FeatureMapArgs& args);
void activation_backward(Context& ctx, const ActivationBackwardArgs& args);
void glu_backward(Context& ctx, const GluBackwardArgs& args);
void forget_gate_backward(Context& ctx, const ForgetGateBackwardArgs& args);
void feature_map_backward(Context& ctx, const FeatureMapBackwardArgs& args);
}  // namespace ops
namespace cpu {
void activation(Context& ctx, const ActivationArgs& args);
void glu(Context& ctx, const GluArgs& args);
void forget_gate(Context& ctx, const ForgetGateArgs& args);
void feature_map(Context& ctx, const FeatureMapArgs& args);
void activation_backward(Context& ctx, const ActivationBackwardArgs& args);
void glu_backward(Context& ctx, const GluBackwardArgs& args);
void forget_gate_backward(Context& ctx, const ForgetGateBackwardArgs& args);
void feature_map_backward(Context& ctx, const FeatureMapBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void activation(Context& ctx, const ActivationArgs& args);
void glu(Context& ctx, const GluArgs& args);
void forget_gate(Context& ctx, const ForgetGateArgs& args);
void feature_map(Context& ctx, const FeatureMapArgs& args);
void activation_backward(Context& ctx, const ActivationBackwardArgs& args);
void glu_backward(Context& ctx, const GluBackwardArgs& args);
void forget_gate_backward(Context& ctx, const ForgetGateBackwardArgs& args);
void feature_map_backward(Context& ctx, const FeatureMapBackwardArgs& args);
}  // namespace cuda
namespace reference {
float activate(Activation activation, float x);
// act'(x)
double activation_slope(Activation activation, double x);
void activation(const ActivationArgs& args);
void glu(const GluArgs& args);
void forget_gate(const ForgetGateArgs& args);
void feature_map(const FeatureMapArgs& args);
void activation_backward(const ActivationBackwardArgs& args);
void glu_backward(const GluBackwardArgs& args);
void forget_gate_backward(const ForgetGateBackwardArgs& args);
void feature_map_backward(const FeatureMapBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
