// See ops/selective_scan.h.
#pragma once

#include <cuda_runtime_api.h>

#include "core/context.h"
#include "cuda/sequence_batch.h"
#include "ops/selective_scan.h"

namespace deltafox::cuda {

constexpr int kMaxScanStates = 64;  // N

struct SelectiveScanProblem {
  const void* x;         // [T, C]
  const float* dt;       // [T, C]
  const float* dt_bias;  // [C]
  const float* a_log;    // [C, N]
  const void* b;         // [T, N]
  const void* c;         // [T, N]
  const float* d;        // [C]
  const void* gate;      // [T, C] or null
  void* y;               // [T, C]
  bool is_bf16;          // x, b, c, gate and y
  int channels;
  int states;
};

// Token by token.
void launch_selective_scan(const SelectiveScanProblem& problem, const SequenceBatch& batch,
                           cudaStream_t stream);

// All chunks of a sequence at once; they are its segments in the batch.
int selective_scan_chunks(int states, int length);
void launch_selective_scan_chunks(Context& ctx, const SelectiveScanProblem& problem,
                                  const SequenceBatch& batch);

void launch_selective_scan_backward(Context& ctx, const SelectiveScanBackwardArgs& args);

}  // namespace deltafox::cuda
