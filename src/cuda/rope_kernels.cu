// Bound by memory: one block a row. Sine and cosine are taken once for all heads.
#include "cuda/eight.cuh"
#include "cuda/rope_kernels.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ void turn(T* x, int heads, int half, const float2* turns) {
  if (half % 8 == 0 && reinterpret_cast<std::uintptr_t>(x) % 16 == 0) {
    for (int i = static_cast<int>(threadIdx.x) * 8; i < heads * half; i += kThreads * 8) {
      const int d = i % half;
      T* head = x + i / half * 2 * half;
      Eight<T> bits[2];
      bits[0].load(head + d);
      bits[1].load(head + d + half);
      float a[8];
      float c[8];
      bits[0].get(a);
      bits[1].get(c);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float2 by = turns[d + e];
        const float low = a[e] * by.x - c[e] * by.y;
        c[e] = a[e] * by.y + c[e] * by.x;
        a[e] = low;
      }
      Eight<T>::store(head + d, a);
      Eight<T>::store(head + d + half, c);
    }
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < heads * half; i += kThreads) {
    const int d = i % half;
    T* head = x + i / half * 2 * half;
    const float a = to_float(head[d]);
    const float c = to_float(head[d + half]);
    const float2 by = turns[d];
    from_float(head[d], a * by.x - c * by.y);
    from_float(head[d + half], a * by.y + c * by.x);
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void rope(const __grid_constant__ RopeProblem problem) {
  extern __shared__ float2 turns[];  // [D / 2] cosine, sine
  const std::int64_t row = blockIdx.x;
  // The last sequence that begins at the row or before; empty ones begin where the next does.
  int low = 0;
  int high = problem.sequence_count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (problem.sequences[middle].row <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const RopeSequence sequence = problem.sequences[low];
  const int runs = problem.recorded_runs == nullptr ? 0 : *problem.recorded_runs;
  const auto position = static_cast<float>(sequence.position + runs + row - sequence.row);
  const int half = problem.dim / 2;
  for (int i = static_cast<int>(threadIdx.x); i < half; i += kThreads) {
    sincosf(position * problem.frequencies[i], &turns[i].y, &turns[i].x);
    if (problem.back) turns[i].y = -turns[i].y;
  }
  __syncthreads();
  turn(static_cast<T*>(problem.q) + row * problem.heads * problem.dim, problem.heads, half, turns);
  turn(static_cast<T*>(problem.k) + row * problem.kv_heads * problem.dim, problem.kv_heads, half,
       turns);
}

}  // namespace

void launch_rope(const RopeProblem& problem, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(problem.tokens);
  const std::size_t shared = static_cast<std::size_t>(problem.dim / 2) * sizeof(float2);
  if (problem.is_bf16) {
    rope<bf16><<<rows, kThreads, shared, stream>>>(problem);
  } else {
    rope<float><<<rows, kThreads, shared, stream>>>(problem);
  }
}

}  // namespace deltafox::cuda
