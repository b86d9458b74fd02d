// Causal depthwise convolution of width W over each sequence: y_t = act(Σ_i w_i · x_{t-W+1+i} [+
// bias])
//
// What lies before the first row comes from the sequence's state: the last W inputs of each
// channel, oldest first, as the official cache keeps them. The state is updated. Sums run from the
// oldest input to the newest, starting from the bias.
#pragma once

#include <span>

#include "core/context.h"
#include "core/sequences.h"
#include "ops/activation.h"

namespace deltafox {

struct ShortConvArgs {
  ConstTensorView x;          // [T, C]
  ConstTensorView w;          // [C, W]
  ConstTensorView bias = {};  // [C] or no data
  Sequences sequences;
  std::span<float* const> states;  // [B], each [C, W]
  Activation activation = Activation::kIdentity;
  TensorView y;  // [T, C], not x
};

namespace ops {
void short_conv(Context& ctx, const ShortConvArgs& args);
}
namespace cpu {
void short_conv(Context& ctx, const ShortConvArgs& args);
}
namespace cuda {
void short_conv(Context& ctx, const ShortConvArgs& args);
}
namespace reference {
void short_conv(const ShortConvArgs& args);
}
}  // namespace deltafox
