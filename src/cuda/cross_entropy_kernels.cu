// One block a row, one pass over its logits. Each thread keeps a running maximum and sum of every
// kThreads-th logit, in float32 for kStretch of them and in float64 across; then they are put
// together in an order that depends on nothing.
#include "cuda/cross_entropy_kernels.h"
#include "cuda/elements.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;

struct Partial {
  double sum;
  float max;
};

__device__ Partial merge(const Partial& a, const Partial& b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return {0, max};
  return {a.sum * static_cast<double>(expf(a.max - max)) +
              b.sum * static_cast<double>(expf(b.max - max)),
          max};
}

template <typename T>
__global__ __launch_bounds__(kThreads) void piece_of_row(
    const __grid_constant__ CrossEntropyPiece piece) {
  __shared__ Partial partials[kThreads];
  const int row = static_cast<int>(blockIdx.x);
  const T* logits =
      static_cast<const T*>(piece.logits) + static_cast<std::int64_t>(row) * piece.count;
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kAtOnce = 8;
  Partial own{0, -INFINITY};
  for (int n = thread; n < piece.count; n += kThreads * kAtOnce) {
    float x[kAtOnce];
    float max = own.max;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      x[i] = n + i * kThreads < piece.count ? to_float(logits[n + i * kThreads]) : -INFINITY;
      max = fmaxf(max, x[i]);
    }
    if (max == -INFINITY) continue;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += expf(x[i] - max);
    own = {own.sum * static_cast<double>(expf(own.max - max)) + sum, max};
  }
  partials[thread] = own;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) partials[thread] = merge(partials[thread], partials[thread + half]);
    __syncthreads();
  }
  if (thread != 0) return;
  const int label = piece.labels[row];
  SoftmaxState state{partials[0].sum, partials[0].max, 0};
  if (piece.first > 0) {
    const SoftmaxState before = piece.states[row];
    const Partial merged = merge({before.sum, before.max}, partials[0]);
    state = {merged.sum, merged.max, before.label};
  }
  if (label >= piece.first && label < piece.first + piece.count) {
    state.label = to_float(logits[label - piece.first]);
  }
  if (!piece.last) {
    piece.states[row] = state;
    return;
  }
  piece.loss[row] = label < 0 ? 0
                              : static_cast<float>(static_cast<double>(state.max) + log(state.sum) -
                                                   static_cast<double>(state.label));
}

}  // namespace

void launch_cross_entropy_piece(const CrossEntropyPiece& piece, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(piece.rows);
  if (piece.is_bf16) {
    piece_of_row<bf16><<<rows, kThreads, 0, stream>>>(piece);
  } else {
    piece_of_row<float><<<rows, kThreads, 0, stream>>>(piece);
  }
}

}  // namespace deltafox::cuda
