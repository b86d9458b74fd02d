// Mixes each token with the one before it: y_t = α_t x_{t−1} + (1 − α_t) x_t, per head
//
// What lies before the first row comes from the sequence's state, the last row of x, which is
// updated. (Lin et al., "Forgetting Transformer", 2025, KV-shift.)
#pragma once

#include <span>

#include "core/context.h"
#include "core/sequences.h"

namespace deltafox {

struct TokenShiftArgs {
  ConstTensorView x;      // [T, H, D]
  ConstTensorView alpha;  // [T, H]
  Sequences sequences;
  std::span<float* const> states;  // [B], each [H, D]
  TensorView y;                    // [T, H, D], not x
};

namespace ops {
void token_shift(Context& ctx, const TokenShiftArgs& args);
}
namespace cpu {
void token_shift(Context& ctx, const TokenShiftArgs& args);
}
namespace cuda {
void token_shift(Context& ctx, const TokenShiftArgs& args);
}
namespace reference {
void token_shift(const TokenShiftArgs& args);
}
}  // namespace deltafox
