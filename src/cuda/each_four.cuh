// Launches of what computes every element by itself.
#pragma once

#include "cuda/check.h"
#include "cuda/rows.cuh"
#include "cuda/stream.h"

namespace deltafox::cuda {

constexpr int kElementThreads = 256;

inline unsigned blocks_for(std::int64_t tasks, int per_block) {
  return static_cast<unsigned>((tasks + per_block - 1) / per_block);
}

// f(first, count) for each four elements; count as in load_four.
template <typename F>
__global__ void __launch_bounds__(kElementThreads)
    each_four_kernel(std::int64_t size, bool aligned, F f) {
  const std::int64_t i =
      (static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * 4;
  if (i >= size) return;
  f(i, aligned && i + 4 <= size ? kVector : static_cast<int>(min(std::int64_t{4}, size - i)));
}

template <typename F>
void each_four(Context& ctx, const char* op, std::int64_t size, bool aligned, F f) {
  if (size == 0) return;
  each_four_kernel<<<blocks_for((size + 3) / 4, kElementThreads), kElementThreads, 0,
                     stream_of(ctx)>>>(size, aligned, f);
  check_launch(op);
}

}  // namespace deltafox::cuda
