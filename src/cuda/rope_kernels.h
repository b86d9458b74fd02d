// See ops/rope.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

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
  const float* frequencies;           // [D / 2], in device memory: base^(−2i/D)
  const std::int32_t* recorded_runs;  // see Context
};

// [D / 2]: base^(−2i/D)
std::vector<float> rope_frequencies(std::int64_t dim, float base);

void launch_rope(const RopeProblem& problem, cudaStream_t stream);

}  // namespace deltafox::cuda
