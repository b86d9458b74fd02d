// Launch of the short convolution on raw pointers.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sequence_batch.h"
#include "ops/activation.h"

namespace deltafox::cuda {

struct ShortConvProblem {
  const void* x;      // [T, C]
  const float* w;     // [C, W]
  const float* bias;  // [C] or null
  void* y;            // [T, C], not x
  bool is_bf16;       // x and y
  int channels;
  int width;
  Activation activation;
};

// Rows of a block: a sequence has a segment for each so many rows.
constexpr int kShortConvRows = 16;

void launch_short_conv(const ShortConvProblem& problem, const SequenceBatch& batch,
                       cudaStream_t stream);

}  // namespace deltafox::cuda
