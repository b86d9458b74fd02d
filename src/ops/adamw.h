// AdamW, one step of a parameter or of all of them, and the norm of gradients.
//
//   g ← scale·grad
//   m ← m + (1 − β₁)(g − m)        v ← β₂ v + (1 − β₂) g²
//   w ← w·(1 − lr·weight_decay) − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//
// Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), in the order of operations
// of torch.optim.AdamW. `scale` is what clipping by the global norm leaves of the gradient.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

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

// A parameter of a step of all.
struct AdamWParam {
  ConstTensorView grad;     // any shape
  TensorView w, m, v;       // the same, float32
  TensorView rounded = {};  // the same, BF16, =: a copy of the new w; or no data
  double weight_decay = 0;
};

// All gradients together are clipped to the norm `max_norm`: scale = min(1, max_norm / (norm +
// 1e-6)), as torch.nn.utils.clip_grad_norm_ has it. If the norm is not finite, it is written and
// nothing else changes. On a GPU nothing waits for it: the scale stays there.
struct AdamWStepArgs {
  std::span<const AdamWParam> params;
  double lr = 0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double max_norm = std::numeric_limits<double>::infinity();
  std::int64_t step = 1;  // t, from 1
  TensorView norm;        // [1], =, of all gradients before clipping; in the device's memory
};

namespace ops {
void adamw(Context& ctx, const AdamWArgs& args);
void adamw_step(Context& ctx, const AdamWStepArgs& args);
// Σ x², summed in float64 in an order that depends on the size alone. On a GPU this waits.
double sum_of_squares(Context& ctx, const ConstTensorView& x);
}  // namespace ops
namespace cpu {
void adamw(Context& ctx, const AdamWArgs& args);
void adamw_step(Context& ctx, const AdamWStepArgs& args);
double sum_of_squares(Context& ctx, const ConstTensorView& x);
}  // namespace cpu
namespace cuda {
void adamw(Context& ctx, const AdamWArgs& args);
void adamw_step(Context& ctx, const AdamWStepArgs& args);
double sum_of_squares(Context& ctx, const ConstTensorView& x);
}  // namespace cuda
namespace reference {
void adamw(const AdamWArgs& args);
}
}  // namespace deltafox
