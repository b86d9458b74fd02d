// Bound by memory: one block a few rows of a sequence.
#include "cuda/elements.cuh"
#include "cuda/rows.cuh"
#include "cuda/token_shift_kernels.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;

__device__ const BatchEntry& entry_of_block(const SequenceBatch& batch) {
  int b = 0;
  while (b + 1 < batch.count && batch.entries[b + 1].first_block <= static_cast<int>(blockIdx.x)) {
    ++b;
  }
  return batch.entries[b];
}

template <typename T>
__global__ __launch_bounds__(kThreads) void shift(const __grid_constant__ TokenShiftProblem problem,
                                                  const __grid_constant__ SequenceBatch batch) {
  const BatchEntry& entry = entry_of_block(batch);
  const int first = (static_cast<int>(blockIdx.x) - entry.first_block) * kTokenShiftRows;
  const int end = min(entry.length, first + kTokenShiftRows);
  const int width = problem.heads * problem.dim;
  const T* x = static_cast<const T*>(problem.x) + static_cast<std::int64_t>(entry.begin) * width;
  T* y = static_cast<T*>(problem.y) + static_cast<std::int64_t>(entry.begin) * width;
  const float* alphas = problem.alpha + static_cast<std::int64_t>(entry.begin) * problem.heads;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += kThreads) {
    const int h = i / problem.dim;
    const auto input = [&](int t) { return to_float(x[static_cast<std::int64_t>(t) * width + i]); };
    float before = first == 0 ? entry.state[i] : input(first - 1);
    for (int t = first; t < end; ++t) {
      const float alpha = alphas[static_cast<std::int64_t>(t) * problem.heads + h];
      const float now = input(t);
      from_float(y[static_cast<std::int64_t>(t) * width + i], alpha * before + (1 - alpha) * now);
      before = now;
    }
    // By the block that has read it.
    if (first == 0) entry.state[i] = input(entry.length - 1);
  }
}

// A warp takes a head of a row at a time.
template <typename T>
__global__ __launch_bounds__(kThreads) void shift_backward(
    const __grid_constant__ TokenShiftBackwardProblem problem,
    const __grid_constant__ SequenceBatch batch) {
  const BatchEntry& entry = entry_of_block(batch);
  const int first = (static_cast<int>(blockIdx.x) - entry.first_block) * kTokenShiftRows;
  const int rows = min(entry.length - first, kTokenShiftRows);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t width = static_cast<std::int64_t>(problem.heads) * problem.dim;
  const T* x = static_cast<const T*>(problem.x);
  const T* dy = static_cast<const T*>(problem.dy);
  for (int i = static_cast<int>(threadIdx.x) / 32; i < rows * problem.heads; i += kThreads / 32) {
    const int t = first + i / problem.heads;
    const std::int64_t at = (static_cast<std::int64_t>(entry.begin) + first) * problem.heads + i;
    const bool has_next = t + 1 < entry.length;
    const float alpha = problem.alpha[at];
    const float next_alpha = has_next ? problem.alpha[at + problem.heads] : 0;
    float dalpha = 0;
    for (int d = lane; d < problem.dim; d += 32) {
      const std::int64_t e = at * problem.dim + d;
      const float now = to_float(dy[e]);
      const float next = has_next ? to_float(dy[e + width]) : 0;
      const float before = t > 0 ? to_float(x[e - width]) : 0;
      dalpha += now * (before - to_float(x[e]));
      from_float(static_cast<T*>(problem.dx)[e], (1 - alpha) * now + next_alpha * next);
    }
    dalpha = warp_sum(dalpha);
    if (lane == 0) problem.dalpha[at] = dalpha;
  }
}

}  // namespace

void launch_token_shift(const TokenShiftProblem& problem, const SequenceBatch& batch,
                        cudaStream_t stream) {
  if (problem.is_bf16) {
    shift<bf16><<<batch.blocks, kThreads, 0, stream>>>(problem, batch);
  } else {
    shift<float><<<batch.blocks, kThreads, 0, stream>>>(problem, batch);
  }
}

void launch_token_shift_backward(const TokenShiftBackwardProblem& problem,
                                 const SequenceBatch& batch, cudaStream_t stream) {
  if (problem.is_bf16) {
    shift_backward<bf16><<<batch.blocks, kThreads, 0, stream>>>(problem, batch);
  } else {
    shift_backward<float><<<batch.blocks, kThreads, 0, stream>>>(problem, batch);
  }
}

}  // namespace deltafox::cuda
