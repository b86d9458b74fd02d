// y_t = table[ids_t]
#pragma once

#include <cstdint>
#include <span>

#include "core/context.h"

namespace deltafox {

struct EmbeddingArgs {
  std::span<const std::int32_t> ids;  // [T], each in [0, N); on a GPU in its memory
  ConstTensorView table;              // [N, C] F32, BF16, F16, kQ8 or kQ4
  TensorView y;                       // [T, C] F32
};

// dtable_n += Σ_{t: ids_t = n} dy_t, on the CPU in the order of the tokens, on a GPU in one that
// depends on the ids alone
struct EmbeddingBackwardArgs {
  std::span<const std::int32_t> ids;  // [T], each in [0, N); on a GPU in its memory
  ConstTensorView dy;                 // [T, C] F32, on a GPU also of the activation dtype
  TensorView dtable;                  // [N, C] F32
};

namespace ops {
void embedding(Context& ctx, const EmbeddingArgs& args);
void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args);
}  // namespace ops
namespace cpu {
void embedding(Context& ctx, const EmbeddingArgs& args);
void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void embedding(Context& ctx, const EmbeddingArgs& args);
void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args);
}  // namespace cuda
namespace reference {
void embedding_backward(const EmbeddingBackwardArgs& args);
}
}  // namespace deltafox
