// y = x · rsqrt(mean(x²) + eps) · w [· act(gate)], over the last dimension
//
// With `gate_first` the gate comes before the norm: x · act(gate) takes the place of x.
//
// Where `scales` are kept, a weight nearer to 0 than 2⁻⁴⁰ counts as 2⁻⁴⁰: then backward, which
// has no use for x besides, finds x · r in y / w.
//
// On a GPU x, y, the gate and their gradients are each F32 or of the Context's activation dtype; w
// and dw are F32. Backward, x and dx are of one dtype and so are dy, y, the gate and its gradient;
// where dx is BF16, so is dy.
#pragma once

#include "core/context.h"
#include "ops/activation.h"

namespace deltafox {

constexpr float kLeastNormWeight = 0x1p-40F;
constexpr float invertible_weight(float w) {
  return -kLeastNormWeight < w && w < kLeastNormWeight ? kLeastNormWeight : w;
}

struct RmsNormArgs {
  ConstTensorView x;  // [R, D]
  ConstTensorView w;  // [G·D], where row r has the weights of group r mod G; no data for ones
  ConstTensorView gate = {};  // [R, D] or no data
  Activation gate_activation = Activation::kSilu;
  bool gate_first = false;
  TensorView y;            // [R, D], may be x
  TensorView scales = {};  // [R] F32: each row's rsqrt, for backward, without a gate; or no data
  float eps = 0;
};

// With r = rsqrt(mean(x²) + eps) and dz the gradient of x · r:
//   dx = r (dz − x · r² mean(dz · x)); dw += Σ_rows dy · x r [· act(gate)]
struct RmsNormBackwardArgs {
  ConstTensorView x = {};       // [R, D]; or no data, and then, without a gate,
  ConstTensorView y = {};       // [R, D] what forward gave, and
  ConstTensorView scales = {};  // [R] F32 what it kept
  ConstTensorView w;            // [G·D] or no data
  ConstTensorView gate = {};    // [R, D] or no data
  Activation gate_activation = Activation::kSilu;
  bool gate_first = false;
  float eps = 0;
  ConstTensorView dy;          // [R, D]
  TensorView dx;               // [R, D], may be dy
  bool accumulate_dx = false;  // dx +=, where dx is not dy
  TensorView rounded = {};     // [R, D] BF16, =: dx once more, for products; or no data
  TensorView dw = {};          // [G·D] or no data
  TensorView dgate = {};       // [R, D], =; with a gate
};

namespace ops {
void rms_norm(Context& ctx, const RmsNormArgs& args);
void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args);
}  // namespace ops
namespace cpu {
void rms_norm(Context& ctx, const RmsNormArgs& args);
void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void rms_norm(Context& ctx, const RmsNormArgs& args);
void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args);
}  // namespace cuda
namespace reference {
void rms_norm(const RmsNormArgs& args);
void rms_norm_backward(const RmsNormBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
