// y = log σ(x + bias): the logarithm of forget gates
#pragma once

#include "core/context.h"

namespace deltafox {

struct LogSigmoidArgs {
  ConstTensorView x = {};     // [T, H], or no data for zeros
  ConstTensorView bias = {};  // [H] or no data
  TensorView y;               // [T, H], may be x
};

// dx = dy · (1 − e^y), dbias += Σ_t dx_t
struct LogSigmoidBackwardArgs {
  ConstTensorView y;      // [T, H]
  ConstTensorView dy;     // [T, H]
  TensorView dx = {};     // [T, H], =, may be dy; no data if x had none
  TensorView dbias = {};  // [H] or no data
};

namespace ops {
void log_sigmoid(Context& ctx, const LogSigmoidArgs& args);
void log_sigmoid_backward(Context& ctx, const LogSigmoidBackwardArgs& args);
}  // namespace ops
namespace cpu {
void log_sigmoid(Context& ctx, const LogSigmoidArgs& args);
void log_sigmoid_backward(Context& ctx, const LogSigmoidBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void log_sigmoid(Context& ctx, const LogSigmoidArgs& args);
void log_sigmoid_backward(Context& ctx, const LogSigmoidBackwardArgs& args);
}  // namespace cuda
namespace reference {
void log_sigmoid(const LogSigmoidArgs& args);
void log_sigmoid_backward(const LogSigmoidBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
