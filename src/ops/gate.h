// x = x · act(gate), in place
#pragma once

#include "core/context.h"
#include "ops/activation.h"

namespace deltafox {

struct GateArgs {
  Activation activation = Activation::kSigmoid;
  ConstTensorView gate;  // any shape
  TensorView x;          // the same
};

namespace ops {
void gate(Context& ctx, const GateArgs& args);
}
namespace cpu {
void gate(Context& ctx, const GateArgs& args);
}
namespace cuda {
void gate(Context& ctx, const GateArgs& args);
}
namespace reference {
void gate(const GateArgs& args);
}
}  // namespace deltafox
