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

namespace ops {
void cross_entropy(Context& ctx, const CrossEntropyArgs& args);
}
namespace cpu {
void cross_entropy(Context& ctx, const CrossEntropyArgs& args);
}
namespace cuda {
void cross_entropy(Context& ctx, const CrossEntropyArgs& args);
}
namespace reference {
void cross_entropy(const CrossEntropyArgs& args);
}
}  // namespace deltafox
