// Bound by memory: one block a few rows of a sequence.
#include "cuda/eight.cuh"
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

constexpr int kEightThreads = 64;

// The same for eight elements of a head a thread, whose loads of some rows are under way at once; a
// column of thread blocks to 512 elements.
template <typename T>
__global__ __launch_bounds__(kEightThreads) void shift_eight(
    const __grid_constant__ TokenShiftProblem problem,
    const __grid_constant__ SequenceBatch batch) {
  constexpr int kAtOnce = 8;
  const BatchEntry& entry = entry_of_block(batch);
  const int first = (static_cast<int>(blockIdx.x) - entry.first_block) * kTokenShiftRows;
  const int end = min(entry.length, first + kTokenShiftRows);
  const int width = problem.heads * problem.dim;
  const int column = static_cast<int>(blockIdx.y * kEightThreads + threadIdx.x) * 8;
  if (column >= width) return;
  const int head = column / problem.dim;
  const std::ptrdiff_t begin = static_cast<std::ptrdiff_t>(entry.begin) * width + column;
  const T* x = static_cast<const T*>(problem.x) + begin;
  T* y = static_cast<T*>(problem.y) + begin;
  const float* alphas =
      problem.alpha + static_cast<std::int64_t>(entry.begin) * problem.heads + head;
  const auto at = [&](int t) { return static_cast<std::ptrdiff_t>(t) * width; };
  float before[8];
  Eight<T> bits;
  if (first == 0) {
    Eight<float> state;
    state.load(entry.state + column);
    state.get(before);
    // By the thread that has read it.
    float last[8];
    bits.load(x + at(entry.length - 1));
    bits.get(last);
    Eight<float>::store(entry.state + column, last);
  } else {
    bits.load(x + at(first - 1));
    bits.get(before);
  }
  for (int t = first; t < end; t += kAtOnce) {
    Eight<T> rows[kAtOnce];
    float alpha[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int row = min(t + r, end - 1);
      rows[r].load(x + at(row));
      alpha[r] = alphas[static_cast<std::int64_t>(row) * problem.heads];
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      if (t + r >= end) break;
      float now[8];
      float out[8];
      rows[r].get(now);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        out[e] = alpha[r] * before[e] + (1 - alpha[r]) * now[e];
        before[e] = now[e];
      }
      Eight<T>::store(y + at(t + r), out);
    }
  }
}

template <typename T>
void launch_forward(const TokenShiftProblem& problem, const SequenceBatch& batch,
                    cudaStream_t stream) {
  const auto bits = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
  bool eights = problem.dim % 8 == 0 && (bits(problem.x) | bits(problem.y)) % 16 == 0;
  for (int b = 0; b < batch.count; ++b) eights = eights && bits(batch.entries[b].state) % 16 == 0;
  if (eights) {
    const int columns = (problem.heads * problem.dim / 8 + kEightThreads - 1) / kEightThreads;
    shift_eight<T><<<dim3(static_cast<unsigned>(batch.blocks), static_cast<unsigned>(columns)),
                     kEightThreads, 0, stream>>>(problem, batch);
  } else {
    shift<T><<<batch.blocks, kThreads, 0, stream>>>(problem, batch);
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

// A thread walks the block's rows of eight elements of a head at a time, with the row of x before
// and the row of dy behind in registers.
template <typename T>
__global__ __launch_bounds__(kThreads) void shift_backward_eight(
    const __grid_constant__ TokenShiftBackwardProblem problem,
    const __grid_constant__ SequenceBatch batch) {
  constexpr int kAtOnce = 4;
  const BatchEntry& entry = entry_of_block(batch);
  const int first = (static_cast<int>(blockIdx.x) - entry.first_block) * kTokenShiftRows;
  const int end = min(entry.length, first + kTokenShiftRows);
  const int width = problem.heads * problem.dim;
  const int lanes = problem.dim / 8;  // of a head
  for (int base = 0; base < width; base += kThreads * 8) {
    const int own = base + static_cast<int>(threadIdx.x) * 8;
    const bool exists = own < width;  // all threads of a warp take part in its sums
    const int column = exists ? own : 0;
    const int head = column / problem.dim;
    const std::ptrdiff_t begin = static_cast<std::ptrdiff_t>(entry.begin) * width + column;
    const T* x = static_cast<const T*>(problem.x) + begin;
    const T* dy = static_cast<const T*>(problem.dy) + begin;
    T* dx = static_cast<T*>(problem.dx) + begin;
    const auto at = [&](int t) { return static_cast<std::ptrdiff_t>(t) * width; };
    const auto scalar_at = [&](int t) {
      return static_cast<std::ptrdiff_t>(entry.begin + t) * problem.heads + head;
    };
    Eight<T> bits = {};
    float before[8];
    float now[8];
    if (first > 0) bits.load(x + at(first - 1));
    bits.get(before);
    bits.load(dy + at(first));
    bits.get(now);
    float alpha = problem.alpha[scalar_at(first)];
    for (int t = first; t < end; t += kAtOnce) {
      Eight<T> x_bits[kAtOnce];
      Eight<T> next_bits[kAtOnce] = {};
      float next_alpha[kAtOnce] = {};
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (t + r >= end) break;
        x_bits[r].load(x + at(t + r));
        if (t + r + 1 >= entry.length) break;
        next_bits[r].load(dy + at(t + r + 1));
        next_alpha[r] = problem.alpha[scalar_at(t + r + 1)];
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (t + r >= end) break;
        float input[8];
        float next[8];
        float d[8];
        x_bits[r].get(input);
        next_bits[r].get(next);
        float dalpha = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          dalpha = fmaf(now[e], before[e] - input[e], dalpha);
          d[e] = (1 - alpha) * now[e] + next_alpha[r] * next[e];
          before[e] = input[e];
          now[e] = next[e];
        }
        alpha = next_alpha[r];
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
          dalpha += __shfl_xor_sync(0xffffffffU, dalpha, offset);
        }
        if (!exists) continue;
        Eight<T>::store(dx + at(t + r), d);
        if (own % problem.dim == 0) problem.dalpha[scalar_at(t + r)] = dalpha;
      }
    }
  }
}

template <typename T>
void launch_backward(const TokenShiftBackwardProblem& problem, const SequenceBatch& batch,
                     cudaStream_t stream) {
  const auto bits = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
  const int lanes = problem.dim / 8;
  const bool eights = problem.dim % 8 == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0 &&
                      (bits(problem.x) | bits(problem.dy) | bits(problem.dx)) % 16 == 0;
  const auto kernel = eights ? shift_backward_eight<T> : shift_backward<T>;
  kernel<<<batch.blocks, kThreads, 0, stream>>>(problem, batch);
}

}  // namespace

void launch_token_shift(const TokenShiftProblem& problem, const SequenceBatch& batch,
                        cudaStream_t stream) {
  problem.is_bf16 ? launch_forward<bf16>(problem, batch, stream)
                  : launch_forward<float>(problem, batch, stream);
}

void launch_token_shift_backward(const TokenShiftBackwardProblem& problem,
                                 const SequenceBatch& batch, cudaStream_t stream) {
  problem.is_bf16 ? launch_backward<bf16>(problem, batch, stream)
                  : launch_backward<float>(problem, batch, stream);
}

}  // namespace deltafox::cuda
