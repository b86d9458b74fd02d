// x = x · act(gate), in place
//
// On a GPU each tensor is F32 or of the Context's activation dtype.
#pragma once

#include "core/context.h"
#include "ops/activation.h"

namespace deltafox {

struct GateArgs {
  Activation activation = Activation::kSigmoid;
  ConstTensorView gate;  // any shape
  TensorView x;          // the same
};

// dx = dy · act(gate), dgate = dy · x · act'(gate)
struct GateBackwardArgs {
  Activation activation = Activation::kSigmoid;
  ConstTensorView gate;  // any shape
  ConstTensorView x;     // the same, before the gate
  ConstTensorView dy;    // the same
  TensorView dx;         // the same, =, may be dy
  TensorView dgate;      // the same, =
};

namespace ops {
void gate(Context& ctx, const GateArgs& args);
void gate_backward(Context& ctx, const GateBackwardArgs& args);
}  // namespace ops
namespace cpu {
void gate(Context& ctx, const GateArgs& args);
void gate_backward(Context& ctx, const GateBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void gate(Context& ctx, const GateArgs& args);
void gate_backward(Context& ctx, const GateBackwardArgs& args);
}  // namespace cuda
namespace reference {
void gate(const GateArgs& args);
void gate_backward(const GateBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
