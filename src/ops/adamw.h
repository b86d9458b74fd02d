// AdamW, one step of one parameter, and the norm of its gradient.
//
//   g ← scale·grad
//   m ← m + (1 − β₁)(g − m)        v ← β₂ v + (1 − β₂) g²
//   w ← w·(1 − lr·weight_decay) − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//
// Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), in the order of operations
// of torch.optim.AdamW. `scale` is what clipping by the global norm leaves of the gradient.
#pragma once

#include <cstdint>

#include "core/context.h"

namespace deltafox {

struct AdamWArgs {
  ConstTensorView grad;  // any shape
  TensorView w, m, v;    // the same, float32
  double lr = 0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  double scale = 1;
  std::int64_t step = 1;  // t, from 1
};

namespace ops {
void adamw(Context& ctx, const AdamWArgs& args);
// Σ x², summed in float64 in an order that depends on the size alone.
double sum_of_squares(Context& ctx, const ConstTensorView& x);
}  // namespace ops
namespace cpu {
void adamw(Context& ctx, const AdamWArgs& args);
double sum_of_squares(Context& ctx, const ConstTensorView& x);
}  // namespace cpu
namespace reference {
void adamw(const AdamWArgs& args);
}
}  // namespace deltafox
