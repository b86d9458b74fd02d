// Token by token: four lanes share a channel's states, which stay in registers. What the next token
// needs is loaded while this one is computed.
#include "cuda/elements.cuh"
#include "cuda/selective_scan_kernels.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 4;
constexpr int kChannels = kThreads / kLanes;

// A token's inputs of one channel.
template <int kStates>
struct Inputs {
  float x;
  float dt;
  float gate;
  float b[kStates];
  float c[kStates];
};

template <typename T, int kStates>
__device__ Inputs<kStates> load(const SelectiveScanProblem& problem, std::int64_t row, int channel,
                                int first_state) {
  Inputs<kStates> inputs;
  const std::int64_t at = row * problem.channels + channel;
  inputs.x = to_float(static_cast<const T*>(problem.x)[at]);
  inputs.dt = problem.dt[at];
  inputs.gate = problem.gate != nullptr ? to_float(static_cast<const T*>(problem.gate)[at]) : 0;
#pragma unroll
  for (int n = 0; n < kStates; ++n) {
    const bool exists = first_state + n < problem.states;
    const std::int64_t of = row * problem.states + first_state + n;
    inputs.b[n] = exists ? to_float(static_cast<const T*>(problem.b)[of]) : 0;
    inputs.c[n] = exists ? to_float(static_cast<const T*>(problem.c)[of]) : 0;
  }
  return inputs;
}

// kStates: of a lane.
template <typename T, int kStates>
__global__ __launch_bounds__(kThreads) void scan(const __grid_constant__ SelectiveScanProblem
                                                     problem,
                                                 const __grid_constant__ SequenceBatch batch) {
  const BatchEntry& entry = batch.entries[blockIdx.y];
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int own = static_cast<int>(blockIdx.x) * kChannels + static_cast<int>(threadIdx.x) / kLanes;
  // Threads behind the last channel go along for the shuffles' sake.
  const int channel = min(own, problem.channels - 1);
  const int first_state = lane * kStates;
  float h[kStates];
  float decay[kStates];
#pragma unroll
  for (int n = 0; n < kStates; ++n) {
    const int state = first_state + n;
    const bool exists = state < problem.states;
    h[n] = exists ? entry.state[state * problem.channels + channel] : 0;
    decay[n] = exists ? -expf(problem.a_log[channel * problem.states + state]) : 0;
  }
  const float bias = problem.dt_bias[channel];
  const float skip = problem.d[channel];
  Inputs<kStates> next = load<T, kStates>(problem, entry.begin, channel, first_state);
  for (int t = 0; t < entry.length; ++t) {
    const std::int64_t row = entry.begin + t;
    const Inputs<kStates> now = next;
    if (t + 1 < entry.length) next = load<T, kStates>(problem, row + 1, channel, first_state);
    const float raw = now.dt + bias;
    const float dt = fmaxf(raw, 0) + log1pf(expf(-fabsf(raw)));
    float sum = lane == 0 ? skip * now.x : 0;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      h[n] = expf(decay[n] * dt) * h[n] + dt * now.b[n] * now.x;
      sum += now.c[n] * h[n];
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(~0U, sum, step);
    if (problem.gate != nullptr) sum *= now.gate / (1 + expf(-now.gate));
    if (lane == 0 && own < problem.channels) {
      from_float(static_cast<T*>(problem.y)[row * problem.channels + channel], sum);
    }
  }
  if (own >= problem.channels) return;
#pragma unroll
  for (int n = 0; n < kStates; ++n) {
    const int state = first_state + n;
    if (state < problem.states) entry.state[state * problem.channels + channel] = h[n];
  }
}

template <typename T>
void launch(const SelectiveScanProblem& problem, const SequenceBatch& batch, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((problem.channels + kChannels - 1) / kChannels),
                  static_cast<unsigned>(batch.count));
  if (problem.states <= 4 * kLanes) {
    scan<T, 4><<<grid, kThreads, 0, stream>>>(problem, batch);
  } else {
    scan<T, kMaxScanStates / kLanes><<<grid, kThreads, 0, stream>>>(problem, batch);
  }
}

}  // namespace

void launch_selective_scan(const SelectiveScanProblem& problem, const SequenceBatch& batch,
                           cudaStream_t stream) {
  if (problem.is_bf16) {
    launch<bf16>(problem, batch, stream);
  } else {
    launch<float>(problem, batch, stream);
  }
}

}  // namespace deltafox::cuda
