// Gated linear attention in chunks on the tensor cores.
#include "cuda/gla_bf16.cuh"

#include <cmath>

#include "cuda/card.h"
#include "cuda/decayed_kernels.h"
#include "cuda/stream.h"

namespace deltafox::cuda {

bool gla_bf16_fits(int key_dim, int value_dim) {
  return key_dim == gla_bf16::kSize && value_dim == gla_bf16::kSize &&
         most_shared_bytes() >= gla_bf16::ColumnLayout::kBytes;
}

void launch_gla_bf16(Context& ctx, const GlaProblem& problem, const SequenceBatch& batch) {
  using namespace gla_bf16;
  constexpr const char* kOp = "gla";
  Params p{};
  p.q = static_cast<const bf16*>(problem.q);
  p.k = problem.k;
  p.g = problem.g;
  p.v = static_cast<const bf16*>(problem.v);
  p.columns = static_cast<bf16*>(problem.o);
  p.heads = problem.heads;
  p.scale = 1 / std::sqrt(static_cast<float>(kSize));
  ScratchScope scratch(ctx);
  p = with_states(scratch, p, batch, false);
  cudaStream_t stream = stream_of(ctx);
  launch(kOp, p, chunk_sums<false>, SumLayout::kBytes, stream);
  launch_chunk_states(kOp, p.states, stream);
  launch(kOp, p, chunk_columns<true>, ColumnLayout::kBytes, stream);
}

}  // namespace deltafox::cuda
