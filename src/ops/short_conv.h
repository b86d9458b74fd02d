// Causal depthwise convolution of width W over each sequence: y_t = act(Σ_i w_i · x_{t-W+1+i} [+
// bias])
//
// What lies before the first row comes from the sequence's state: the last W inputs of each
// channel, oldest first, as the official cache keeps them. The state is updated. Sums run from the
// oldest input to the newest, starting from the bias. With `norm_width` an L2 norm of y over each
// head's channels follows (FeatureNorm::kL2 of ops/activation.h), to the bit as feature_map.
//
// On a GPU x, y and their gradients are F32 or of the Context's activation dtype; the rest is F32.
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
  std::int64_t norm_width = 0;  // channels of a head, or 0
  TensorView y;                 // [T, C], not x
};

// Of whole sequences, which begin from a zero state. With s the sums before the activation:
//   ds = dy · act'(s), dx_t = Σ_i w_i · ds_{t+W-1-i}, dw_i += Σ_t ds_t · x_{t-W+1+i}, dbias += Σ_t
//   ds_t
// With `norm_width` dy is the gradient behind an L2 norm of act(s) over each head's channels
// (FeatureNorm::kL2 of ops/activation.h). On a GPU rows of x and dx may be longer than C: what lies
// behind is not touched.
struct ShortConvBackwardArgs {
  ConstTensorView x;          // [T, C]
  ConstTensorView w;          // [C, W]
  ConstTensorView bias = {};  // [C] or no data
  Sequences sequences;
  Activation activation = Activation::kIdentity;
  std::int64_t norm_width = 0;  // channels of a head, or 0
  ConstTensorView dy;           // [T, C]
  TensorView dx;                // [T, C], =, not dy
  TensorView dw = {};           // [C, W] or no data
  TensorView dbias = {};        // [C] or no data
};

namespace ops {
void short_conv(Context& ctx, const ShortConvArgs& args);
void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args);
}  // namespace ops
namespace cpu {
void short_conv(Context& ctx, const ShortConvArgs& args);
void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void short_conv(Context& ctx, const ShortConvArgs& args);
void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args);
// Whether short_conv_backward takes args.norm_width > 0.
bool short_conv_backward_has_norm(const ShortConvBackwardArgs& args);
}  // namespace cuda
namespace reference {
void short_conv(const ShortConvArgs& args);
void short_conv_backward(const ShortConvBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
