// The decays within a chunk of 64 rows of Mamba-2's state space.
#pragma once

#include "cuda/tensor_core.cuh"

namespace deltafox::cuda {

// Of rows 2l and 2l + 1, for lane l: Δ, and λ, the sum of log a from the chunk's first row on.
struct ChunkDecays {
  float step[2];
  float lambda[2];
  float last;  // λ of the chunk's last row
};

// By a warp; step(t) is Δ of a row. Rows behind the last neither add nor decay.
template <class Step>
__device__ ChunkDecays find_decays(float rate, int valid_rows, const Step& step) {
  const int lane = threadIdx.x % 32;
  ChunkDecays d;
  float log_decay[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    d.step[i] = 2 * lane + i < valid_rows ? step(2 * lane + i) : 0;
    log_decay[i] = rate * d.step[i];
  }
  float sum = log_decay[0] + log_decay[1];
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float before = __shfl_up_sync(0xffffffffU, sum, offset);
    if (lane >= offset) sum += before;
  }
  d.last = __shfl_sync(0xffffffffU, sum, 31);
  d.lambda[0] = sum - log_decay[1];
  d.lambda[1] = sum;
  return d;
}

}  // namespace deltafox::cuda
