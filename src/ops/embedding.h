// y_t = table[ids_t]
#pragma once

#include <cstdint>
#include <span>

#include "core/context.h"

namespace deltafox {

struct EmbeddingArgs {
  std::span<const std::int32_t> ids;  // [T], each in [0, N)
  ConstTensorView table;              // [N, C] F32, BF16, F16, kQ8 or kQ4
  TensorView y;                       // [T, C] F32
};

namespace ops {
void embedding(Context& ctx, const EmbeddingArgs& args);
}
namespace cpu {
void embedding(Context& ctx, const EmbeddingArgs& args);
}
}  // namespace deltafox
