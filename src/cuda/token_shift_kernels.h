// See ops/token_shift.h.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sequence_batch.h"

namespace deltafox::cuda {

constexpr int kTokenShiftRows = 16;  // of a part of a sequence

struct TokenShiftProblem {
  const void* x;       // [T, H, D]
  const float* alpha;  // [T, H]
  void* y;             // [T, H, D]
  bool is_bf16;        // x and y
  int heads;
  int dim;
};

struct TokenShiftBackwardProblem {
  const void* x;       // [T, H, D]
  const float* alpha;  // [T, H]
  const void* dy;      // [T, H, D]
  void* dx;            // [T, H, D]
  float* dalpha;       // [T, H]
  bool is_bf16;        // x, dy and dx
  int heads;
  int dim;
};

void launch_token_shift(const TokenShiftProblem& problem, const SequenceBatch& batch,
                        cudaStream_t stream);
void launch_token_shift_backward(const TokenShiftBackwardProblem& problem,
                                 const SequenceBatch& batch, cudaStream_t stream);

}  // namespace deltafox::cuda
