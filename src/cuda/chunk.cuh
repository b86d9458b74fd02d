// The tokens of a block that works on one chunk of one sequence.
#pragma once

#include <cstddef>

#include "cuda/sequence_batch.h"

namespace deltafox::cuda {

struct Chunk {
  std::ptrdiff_t begin;  // the first
  int tokens;

  // Chunk `block` of all, which have `size` tokens; they are the segments of the batch.
  __device__ Chunk(const SequenceBatch& batch, int block, int size) {
    int low = 0;
    int high = batch.count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (batch.entries[middle].first_block <= block ? low : high) = middle;
    }
    const BatchEntry& entry = batch.entries[low];
    const int first = (block - entry.first_block) * size;
    begin = entry.begin + first;
    tokens = min(size, entry.length - first);
  }
};

}  // namespace deltafox::cuda
