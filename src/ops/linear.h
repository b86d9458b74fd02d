// y = x wᵀ [+ bias] [+ y]
//
// By the kind of w:
//   F32, F16  products and sums are float32
//   BF16      x is rounded to bfloat16; products and sums are float32
//   kQ8, kQ4  x is rounded to 8-bit integers with a scale for each 256 columns of a row; products
//             of 256 columns are added exactly, then as float32 in order: the same bits on every
//             machine
// Each element is the sum of its K products in an order that depends on K and the instruction set
// alone: not on T, N, the position in the matrix or the number of threads. So a token's result does
// not depend on the tokens beside it.
//
// On a GPU w and x are both F32 or both BF16, or w is packed and x BF16: weights are then integers
// times a scale for a few rows of x, and rounded to bfloat16 for more. y is F32 or of the Context's
// activation dtype. There
// rows of y (and of dy) may be longer than N: what lies behind is not touched. Rows that start
// aligned make products with an odd N, such as a vocabulary's, several times as fast.
#pragma once

#include "core/context.h"
#include "ops/activation.h"

namespace deltafox {

struct LinearArgs {
  ConstTensorView x;          // [T, K] F32
  ConstTensorView w;          // [N, K] of any kind above
  TensorView y;               // [T, N] F32
  bool accumulate = false;    // y += x wᵀ
  ConstTensorView bias = {};  // [N] F32 or no data
};

// y = act(gate) · up, where [gate | up] = x wᵀ. What is asked for changes no bit of the rest.
struct LinearGluArgs {
  Activation activation = Activation::kSilu;
  ConstTensorView x;        // [T, K]
  ConstTensorView w;        // [2N, K]
  TensorView gate_up = {};  // [T, 2N] or no data
  TensorView y = {};        // [T, N] or no data
};

// A sum that is added to, or that begins.
struct SumView : TensorView {
  bool begins = false;  // =: what is there is no part of it

  SumView() = default;
  // NOLINTNEXTLINE(google-explicit-constructor)
  SumView(const TensorView& view, bool begins_here = false)
      : TensorView(view), begins(begins_here) {}
};

// dx = dy w, or dx += dy w; dw += dyᵀ x, or dw =; dbias += Σ_t dy_t
//
// The order of each sum depends on its length alone, as in linear. With w BF16 dy and x are rounded
// to bfloat16, products and sums are float32. On a GPU dy and dx are F32 or of
// the Context's activation dtype; dy is rounded to the dtype of x and w; dw and dbias are F32.
struct LinearBackwardArgs {
  ConstTensorView dy;          // [T, N]
  ConstTensorView x;           // [T, K]
  ConstTensorView w;           // [N, K] F32 or BF16
  TensorView dx = {};          // [T, K] or no data
  bool accumulate_dx = false;  // dx += dy w
  SumView dw = {};             // [N, K] or no data
  TensorView dbias = {};       // [N] or no data
};

namespace ops {
void linear(Context& ctx, const LinearArgs& args);
void linear_glu(Context& ctx, const LinearGluArgs& args);
void linear_backward(Context& ctx, const LinearBackwardArgs& args);
}  // namespace ops
namespace cpu {
// Whether products with BF16 matrices, and their gradients, are faster than with F32.
bool has_fast_bf16_products();
void linear(Context& ctx, const LinearArgs& args);
// False where no kernel computes it in one pass.
bool linear_glu(Context& ctx, const LinearGluArgs& args);
void linear_backward(Context& ctx, const LinearBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void linear(Context& ctx, const LinearArgs& args);
// False where no kernel computes it in one pass.
bool linear_glu(Context& ctx, const LinearGluArgs& args);
void linear_backward(Context& ctx, const LinearBackwardArgs& args);
}  // namespace cuda
namespace reference {
void linear(const LinearArgs& args);
void linear_backward(const LinearBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
