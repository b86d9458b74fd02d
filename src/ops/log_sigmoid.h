// y = log σ(x + bias): the logarithm of forget gates
#pragma once

#include "core/context.h"

namespace deltafox {

struct LogSigmoidArgs {
  ConstTensorView x = {};     // [T, H], or no data for zeros
  ConstTensorView bias = {};  // [H] or no data
  TensorView y;               // [T, H], may be x
};

namespace ops {
void log_sigmoid(Context& ctx, const LogSigmoidArgs& args);
}
namespace cpu {
void log_sigmoid(Context& ctx, const LogSigmoidArgs& args);
}
namespace cuda {
void log_sigmoid(Context& ctx, const LogSigmoidArgs& args);
}
namespace reference {
void log_sigmoid(const LogSigmoidArgs& args);
}
}  // namespace deltafox
