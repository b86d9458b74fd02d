// y = x · rsqrt(mean(x²) + eps) · w [· act(gate)], over the last dimension
//
// With `gate_first` the gate comes before the norm: x · act(gate) takes the place of x.
#pragma once

#include "core/context.h"
#include "ops/activation.h"

namespace deltafox {

struct RmsNormArgs {
  ConstTensorView x;  // [R, D]
  ConstTensorView w;  // [G·D], where row r has the weights of group r mod G; no data for ones
  ConstTensorView gate = {};  // [R, D] or no data
  Activation gate_activation = Activation::kSilu;
  bool gate_first = false;
  TensorView y;  // [R, D], may be x
  float eps = 0;
};

namespace ops {
void rms_norm(Context& ctx, const RmsNormArgs& args);
}
namespace cpu {
void rms_norm(Context& ctx, const RmsNormArgs& args);
}
namespace cuda {
void rms_norm(Context& ctx, const RmsNormArgs& args);
}
namespace reference {
void rms_norm(const RmsNormArgs& args);
}
}  // namespace deltafox
