// Launch of the short convolution on raw pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/sequence_batch.h"
#include "ops/activation.h"

namespace deltafox::cuda {

struct ShortConvProblem {
  const void* x;      // [T, x_stride]
  const float* w;     // [C, W]
  const float* bias;  // [C] or null
  void* y;            // [T, C], not x
  bool is_bf16;       // x and y
  std::int64_t x_stride;
  int channels;
  int width;
  bool fast;       // four taps, eight channels a thread, 16 bytes at a time
  int norm_lanes;  // threads of a head, or 0 without a norm; else `fast`
  Activation activation;
};

constexpr int kShortConvChannels = 8;  // of a thread of the fast kernel

// Rows of a block: a sequence has a segment for each so many rows.
constexpr int kShortConvRows = 16;

void launch_short_conv(const ShortConvProblem& problem, const SequenceBatch& batch,
                       cudaStream_t stream);

}  // namespace deltafox::cuda
