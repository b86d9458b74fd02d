// See ops/cross_entropy.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace deltafox::cuda {

// What is known of a row's softmax after some of its logits.
struct SoftmaxState {
  double sum;   // of e^(logit − max)
  float max;    // of the logits
  float label;  // the label's logit, once seen
};

// A piece of the vocabulary: columns [first, first + count) of the logits.
struct CrossEntropyPiece {
  const void* logits;  // [T, count]
  bool is_bf16;
  std::int32_t rows;
  std::int32_t first;
  std::int32_t count;
  bool last;                   // writes the loss
  const std::int32_t* labels;  // [T], in device memory
  SoftmaxState* states;        // [T]; not read by the first piece
  float* loss;                 // [T], in device memory
};

void launch_cross_entropy_piece(const CrossEntropyPiece& piece, cudaStream_t stream);

}  // namespace deltafox::cuda
