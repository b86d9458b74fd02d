// Packed weight matrices on a GPU; packed.cuh has their order in memory.
#pragma once

#include "core/context.h"
#include "ops/embedding.h"
#include "ops/linear.h"

namespace deltafox::cuda {

// w as BF16 in scratch memory: each weight rounded once.
TensorView unpacked(Context& ctx, ScratchScope& scratch, const ConstTensorView& w);

// linear up to so many rows as they are packed. False where the card or alignments do not fit.
constexpr std::int64_t kPackedProductRows = 128;
bool packed_product(Context& ctx, const LinearArgs& args);

void packed_embedding(Context& ctx, const EmbeddingArgs& args);

}  // namespace deltafox::cuda
