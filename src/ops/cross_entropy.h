// loss_t = log Σ_n exp(logits_tn) − logits_t,label_t; a negative label gives 0
#pragma once

#include <cstdint>
#include <span>

#include "core/context.h"

namespace deltafox {

struct CrossEntropyArgs {
  ConstTensorView logits;                // [T, N]
  std::span<const std::int32_t> labels;  // [T], below N
  std::span<float> loss;                 // [T]
};

// With the loss, the gradient of Σ_t scale · loss_t: dlogits_t = scale · (softmax(logits_t) −
// onehot(label_t)), zeros where the label is negative
//
// On a GPU logits are F32 or of the Context's activation dtype, labels and loss lie in its memory,
// and rows may be longer than N (see ops/linear.h): then N is `classes`, and what lies behind is
// not touched.
struct CrossEntropyBackwardArgs {
  TensorView logits;                     // [T, N], in: logits, out: dlogits
  std::int64_t classes = 0;              // N, or 0 for all columns
  std::span<const std::int32_t> labels;  // [T], below N
  float scale = 1;
  std::span<float> loss;  // [T], as of cross_entropy
};

namespace ops {
void cross_entropy(Context& ctx, const CrossEntropyArgs& args);
void cross_entropy_backward(Context& ctx, const CrossEntropyBackwardArgs& args);
}  // namespace ops
namespace cpu {
void cross_entropy(Context& ctx, const CrossEntropyArgs& args);
void cross_entropy_backward(Context& ctx, const CrossEntropyBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void cross_entropy(Context& ctx, const CrossEntropyArgs& args);
void cross_entropy_backward(Context& ctx, const CrossEntropyBackwardArgs& args);
}  // namespace cuda
namespace reference {
void cross_entropy(const CrossEntropyArgs& args);
void cross_entropy_backward(const CrossEntropyBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
