// Mixes each token with the one before it: y_t = α_t x_{t−1} + (1 − α_t) x_t, per head
//
// What lies before the first row comes from the sequence's state, the last row of x, which is
// updated. (Lin et al., "Forgetting Transformer", 2025, KV-shift.)
//
// On a GPU x, y and their gradients are F32 or of the Context's activation dtype; alpha and dalpha
// are F32.
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

// Of whole sequences, which begin from a zero state:
//   dx_t = (1 − α_t) dy_t + α_{t+1} dy_{t+1},  dα_t = Σ_d dy_t (x_{t−1} − x_t)
struct TokenShiftBackwardArgs {
  ConstTensorView x;      // [T, H, D]
  ConstTensorView alpha;  // [T, H]
  Sequences sequences;
  ConstTensorView dy;  // [T, H, D]
  TensorView dx;       // [T, H, D], =, not dy
  TensorView dalpha;   // [T, H], =
};

namespace ops {
void token_shift(Context& ctx, const TokenShiftArgs& args);
void token_shift_backward(Context& ctx, const TokenShiftBackwardArgs& args);
}  // namespace ops
namespace cpu {
void token_shift(Context& ctx, const TokenShiftArgs& args);
void token_shift_backward(Context& ctx, const TokenShiftBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void token_shift(Context& ctx, const TokenShiftArgs& args);
void token_shift_backward(Context& ctx, const TokenShiftBackwardArgs& args);
}  // namespace cuda
namespace reference {
void token_shift(const TokenShiftArgs& args);
void token_shift_backward(const TokenShiftBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
