// y = x · rsqrt(mean(x²) + eps) · w [· act(gate)], over the last dimension
#pragma once

#include "core/context.h"
#include "ops/activation.h"

namespace deltafox {

struct RmsNormArgs {
  ConstTensorView x;  // [R, D]
  ConstTensorView w;  // [D]
  // Where given, the normed row is multiplied by gate_activation(gate).
  ConstTensorView gate = {};  // [R, D] or no data
  Activation gate_activation = Activation::kSilu;
  TensorView y;  // [R, D], may be x
  float eps = 0;
};

namespace ops {
void rms_norm(Context& ctx, const RmsNormArgs& args);
}
namespace cpu {
void rms_norm(Context& ctx, const RmsNormArgs& args);
}
namespace reference {
void rms_norm(const RmsNormArgs& args);
}
}  // namespace deltafox
