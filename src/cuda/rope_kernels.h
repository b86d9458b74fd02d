// See ops/rope.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace deltafox::cuda {

struct RopeSequence {
  std::int64_t position;  // of its first row
  std::int64_t row;       // of the batch
};

struct RopeProblem {
  void* q;  // [T, H, D]
  void* k;  // [T, G, D]
  bool is_bf16;
  int heads;
  int kv_heads;
  int dim;
  bool back;  // by the negative angles
  std::int64_t tokens;
  const RopeSequence* sequences;  // [B], in device memory
  int sequence_count;
  const float* frequencies;  // [D / 2], in device memory: base^(−2i/D)
};

void launch_rope(const RopeProblem& problem, cudaStream_t stream);

}  // namespace deltafox::cuda
