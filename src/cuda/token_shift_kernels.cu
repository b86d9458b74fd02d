// Bound by memory: one block a few rows of a sequence.
#include "cuda/elements.cuh"
#include "cuda/token_shift_kernels.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ __launch_bounds__(kThreads) void shift(const __grid_constant__ TokenShiftProblem problem,
                                                  const __grid_constant__ SequenceBatch batch) {
  int b = 0;
  while (b + 1 < batch.count && batch.entries[b + 1].first_block <= static_cast<int>(blockIdx.x)) {
    ++b;
  }
  const BatchEntry& entry = batch.entries[b];
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

}  // namespace

void launch_token_shift(const TokenShiftProblem& problem, const SequenceBatch& batch,
                        cudaStream_t stream) {
  if (problem.is_bf16) {
    shift<bf16><<<batch.blocks, kThreads, 0, stream>>>(problem, batch);
  } else {
    shift<float><<<batch.blocks, kThreads, 0, stream>>>(problem, batch);
  }
}

}  // namespace deltafox::cuda
