// Packed weight matrices on a GPU; packed.cuh has their order in memory.
#pragma once

#include "core/context.h"
#include "ops/embedding.h"
#include "ops/linear.h"

namespace deltafox::cuda {

// w as BF16 in scratch memory: each weight rounded once.
TensorView unpacked(Context& ctx, ScratchScope& scratch, const ConstTensorView& w);

void packed_embedding(Context& ctx, const EmbeddingArgs& args);

}  // namespace deltafox::cuda
