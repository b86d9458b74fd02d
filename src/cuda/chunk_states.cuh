// The states before the chunks of sequences from what each chunk adds to them, and the gradients of
// the states behind them from what each adds to those: in bfloat16 in memory, where one takes the
// other's place, in float32 in between.
#pragma once

#include "cuda/check.h"
#include "cuda/eight.cuh"
#include "cuda/sequence_batch.h"

namespace deltafox::cuda {

struct ChunkStates {
  bf16* states;         // [chunks, H, size]
  bf16* d_states;       // [chunks, H, size] or null
  const float* decays;  // [chunks, H, size / alike], of a whole chunk
  int heads;
  int size;             // a multiple of 8
  int alike;            // so many neighbours decay alike, a multiple of 8
  SequenceBatch batch;  // chunks are segments; states [H, size], updated, or null for zeros
};

constexpr int kChunkStateThreads = 128;

// Eight elements of a head's state a thread; blockIdx.z: a sequence, and with kGradients two for
// each, forwards and backwards.
template <bool kGradients>
__global__ void __launch_bounds__(kChunkStateThreads)
    scan_chunk_states(const __grid_constant__ ChunkStates p) {
  constexpr int kAtOnce = 8;
  const BatchEntry& entry = p.batch.entries[kGradients ? blockIdx.z / 2 : blockIdx.z];
  const bool forwards = !kGradients || blockIdx.z % 2 == 0;
  const int head = static_cast<int>(blockIdx.y);
  const int i = static_cast<int>(blockIdx.x * kChunkStateThreads + threadIdx.x) * 8;
  if (i >= p.size) return;
  bf16* states = forwards ? p.states : p.d_states;
  const int last = entry.first_block + entry.segments - 1;
  const auto at = [&](int step) {  // of chunks and heads
    return static_cast<std::ptrdiff_t>(forwards ? entry.first_block + step : last - step) *
               p.heads +
           head;
  };
  float* outer = forwards && entry.state != nullptr
                     ? entry.state + static_cast<std::ptrdiff_t>(head) * p.size + i
                     : nullptr;
  float state[8] = {};
  if (outer != nullptr) {
    Eight<float> known;
    known.load(outer);
    known.get(state);
  }
  for (int first = 0; first < entry.segments; first += kAtOnce) {
    Eight<bf16> sums[kAtOnce];
    float decays[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n >= entry.segments) break;
      sums[n].load(states + at(first + n) * p.size + i);
      decays[n] = p.decays[(at(first + n) * p.size + i) / p.alike];
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n >= entry.segments) break;
      Eight<bf16>::store(states + at(first + n) * p.size + i, state);
      float sum[8];
      sums[n].get(sum);
#pragma unroll
      for (int e = 0; e < 8; ++e) state[e] = fmaf(decays[n], state[e], sum[e]);
    }
  }
  if (outer != nullptr) Eight<float>::store(outer, state);
}

inline void launch_chunk_states(const char* op, const ChunkStates& p, cudaStream_t stream) {
  const bool gradients = p.d_states != nullptr;
  const dim3 grid(static_cast<unsigned>((p.size / 8 + kChunkStateThreads - 1) / kChunkStateThreads),
                  static_cast<unsigned>(p.heads),
                  static_cast<unsigned>(gradients ? 2 * p.batch.count : p.batch.count));
  const auto scan = gradients ? scan_chunk_states<true> : scan_chunk_states<false>;
  scan<<<grid, kChunkStateThreads, 0, stream>>>(p);
  check_launch(op);
}

}  // namespace deltafox::cuda
