// The selective scan in chunks of tokens (the equations are in ops/selective_scan.h), in float32:
// what outputs and gradients share. All chunks are worked on at once but for one pass along them:
//
// 1. chunk_sums: what a chunk leaves in a state of zeros, and of its gradient before the chunk
//    where that behind it is zero; and ΣΔ, by which it decays both.
// 2. scan_chunks: from these the state before every chunk and the gradient behind it.
// 3. chunk_outputs (selective_scan_chunks.cu) or chunk_gradients (selective_scan_backward.cu).
//
// Four lanes share the states of a channel.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "cuda/chunk.cuh"
#include "cuda/each_four.cuh"
#include "cuda/selective_scan_kernels.h"

namespace deltafox::cuda::scan {

constexpr const char* kOp = "selective_scan";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLanes = 4;  // of a channel
constexpr int kChannels = kThreads / kLanes;
constexpr int kScanThreads = 256;
constexpr float kLog2OfE = 1.44269504F;
constexpr float kLogOf2 = 0.69314718F;

// 2^x to 22 bits in one instruction; below 2^−126 zero.
__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct ScanInputs {
  Elements x;            // [T, C]
  Elements b, c;         // [T, N]
  Elements gate;         // [T, C] or no data
  Elements y;            // [T, C]; dy where gradients are computed
  const float* dt;       // [T, C]
  const float* dt_bias;  // [C]
  const float* a_log;    // [C, N]
  const float* d;        // [C]
  int channels;
  int states;
  bool aligned = false;  // all that has channels starts at a whole vector

  __device__ float rate(int channel, int state) const {  // exp2_of(rate · Δ) is the decay
    return -kLog2OfE * expf(a_log[static_cast<std::ptrdiff_t>(channel) * states + state]);
  }
};

struct ScanWorkspace {
  float* h = nullptr;      // [chunks, N, C], sums and then the states before the chunks
  float* dh = nullptr;     // [chunks, N, C], sums and then the gradients behind the chunks
  float* steps = nullptr;  // [chunks, C], ΣΔ
};

struct ScanParams {
  ScanInputs in;
  ScanWorkspace workspace = {};
  SequenceBatch batch = {};
};

// kStates: of a lane.
template <int kStates>
struct Sizes {
  static constexpr int kSub = kMaxScanStates / kStates;  // tokens
  static constexpr int kSubs = 4;
  static constexpr int kChunk = kSubs * kSub;
  static constexpr int kSums = 2 * kStates;  // of a lane, db and dc
};

// What a chunk's tokens bring for a block's channels: nothing, where there are none.
template <int kStates>
struct Tiles {
  static constexpr int kChunk = Sizes<kStates>::kChunk;
  float x[kChunk][kChannels];
  float step[kChunk][kChannels];   // Δ
  float y[kChunk][kChannels];      // silu(gate) or 1, dy times that where gradients are computed
  float slope[kChunk][kChannels];  // for gradients, dy · silu'(gate)
  float b[kChunk][kLanes * kStates];
  float c[kChunk][kLanes * kStates];

  template <bool kGradients>
  __device__ void load(const ScanInputs& in, const Chunk& chunk, int first_channel) {
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < kChunk * kChannels / 4; i += kThreads) {
      const int t = i / (kChannels / 4);
      const int column = i % (kChannels / 4) * 4;
      const int channel = first_channel + column;
      const int count = t >= chunk.tokens ? 0
                        : in.aligned      ? count_columns(channel, in.channels)
                                          : min(max(in.channels - channel, 0), 4);
      const std::int64_t at = (chunk.begin + t) * in.channels + channel;
      float to_x[4];
      float raw[4];
      float gate[4];
      float dy[4];
      in.x.load(to_x, at, count);
      load_four(raw, in.dt + at, count);
      if (in.gate.data != nullptr) in.gate.load(gate, at, count);
      if (kGradients) in.y.load(dy, at, count);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[t][column + e] = to_x[e];
        float delta = 0;
        if (e < count) {
          raw[e] += in.dt_bias[channel + e];
          delta = fmaxf(raw[e], 0) + log1pf(expf(-fabsf(raw[e])));
        }
        step[t][column + e] = delta;
        const float from = kGradients ? dy[e] : 1;
        y[t][column + e] =
            in.gate.data != nullptr ? from * activate(Activation::kSilu, gate[e]) : from;
        if (kGradients) {
          slope[t][column + e] =
              in.gate.data != nullptr ? from * activation_slope(Activation::kSilu, gate[e]) : 0;
        }
      }
    }
    for (int i = thread; i < kChunk * kLanes * kStates; i += kThreads) {
      const int t = i / (kLanes * kStates);
      const int n = i % (kLanes * kStates);
      const bool exists = t < chunk.tokens && n < in.states;
      const std::int64_t at = (chunk.begin + t) * in.states + n;
      b[t][n] = exists ? in.b.get(at) : 0;
      c[t][n] = exists ? in.c.get(at) : 0;
    }
  }
};

// [kChunk, kChannels] of a tile to rows of C channels.
template <int kChunk, class Put>
__device__ void store_tile(const float (&tile)[kChunk][kChannels], const ScanInputs& in,
                           const Chunk& chunk, int first_channel, const Put& put) {
  for (int i = static_cast<int>(threadIdx.x); i < kChunk * kChannels / 4; i += kThreads) {
    const int t = i / (kChannels / 4);
    const int column = i % (kChannels / 4) * 4;
    const int channel = first_channel + column;
    if (t >= chunk.tokens || channel >= in.channels) continue;
    const int count =
        in.aligned ? count_columns(channel, in.channels) : min(in.channels - channel, 4);
    float four[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) four[e] = tile[t][column + e];
    put(four, (chunk.begin + t) * in.channels + channel, count);
  }
}

// What a lane has of its channel.
template <int kStates>
struct Lane {
  int own;      // channel of the block
  int channel;  // of all; may be behind the last
  int first;    // state
  float rates[kStates];

  __device__ explicit Lane(const ScanInputs& in)
      : own(static_cast<int>(threadIdx.x) / kLanes),
        channel(static_cast<int>(blockIdx.x) * kChannels + own),
        first(static_cast<int>(threadIdx.x) % kLanes * kStates) {
#pragma unroll
    for (int n = 0; n < kStates; ++n) rates[n] = exists(in, n) ? in.rate(channel, first + n) : 0;
  }
  __device__ bool exists(const ScanInputs& in, int n) const {
    return channel < in.channels && first + n < in.states;
  }
  __device__ std::ptrdiff_t state_at(const ScanInputs& in, int n) const {
    return (static_cast<std::ptrdiff_t>(blockIdx.y) * in.states + first + n) * in.channels +
           channel;
  }
  __device__ void load(float (&to)[kStates], const ScanInputs& in, const float* states) const {
#pragma unroll
    for (int n = 0; n < kStates; ++n) to[n] = exists(in, n) ? states[state_at(in, n)] : 0;
  }
  __device__ void store(const float (&from)[kStates], const ScanInputs& in, float* states) const {
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      if (exists(in, n)) states[state_at(in, n)] = from[n];
    }
  }
  // The state behind token t from the one before it.
  __device__ void advance(float (&h)[kStates], const Tiles<kStates>& tiles, int t) const {
    const float step = tiles.step[t][own];
    const float input = step * tiles.x[t][own];
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      h[n] = fmaf(exp2_of(rates[n] * step), h[n], tiles.b[t][first + n] * input);
    }
  }
};

// The sum over the lanes of a channel, the same in all.
__device__ inline float channel_sum(float x) {
  x += __shfl_xor_sync(0xffffffffU, x, 1);
  return x + __shfl_xor_sync(0xffffffffU, x, 2);
}

template <int kStates>
__device__ Tiles<kStates>& shared_tiles() {
  extern __shared__ __align__(16) unsigned char shared[];
  return *reinterpret_cast<Tiles<kStates>*>(shared);
}

template <int kStates, bool kGradients>
__global__ void __launch_bounds__(kThreads) chunk_sums(const __grid_constant__ ScanParams p) {
  constexpr int kChunk = Sizes<kStates>::kChunk;
  Tiles<kStates>& tiles = shared_tiles<kStates>();
  const Chunk chunk(p.batch, static_cast<int>(blockIdx.y), kChunk);
  tiles.template load<kGradients>(p.in, chunk, static_cast<int>(blockIdx.x) * kChannels);
  const Lane<kStates> lane(p.in);
  __syncthreads();
  float h[kStates] = {};
  float dh[kStates] = {};
  float before[kStates];  // decays from the chunk's first token to this one
  float steps = 0;
#pragma unroll
  for (float& decay : before) decay = 1;
#pragma unroll 4
  for (int t = 0; t < kChunk; ++t) {
    const float step = tiles.step[t][lane.own];
    const float input = step * tiles.x[t][lane.own];
    const float dy = tiles.y[t][lane.own];
    steps += step;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      const float decay = exp2_of(lane.rates[n] * step);
      h[n] = fmaf(decay, h[n], tiles.b[t][lane.first + n] * input);
      if constexpr (kGradients) {
        before[n] *= decay;
        dh[n] = fmaf(before[n] * dy, tiles.c[t][lane.first + n], dh[n]);
      }
    }
  }
  lane.store(h, p.in, p.workspace.h);
  if constexpr (kGradients) lane.store(dh, p.in, p.workspace.dh);
  if (lane.first == 0 && lane.channel < p.in.channels) {
    p.workspace.steps[static_cast<std::ptrdiff_t>(blockIdx.y) * p.in.channels + lane.channel] =
        steps;
  }
}

// blockIdx.y: a sequence. Forwards from its state, which is updated, or from zero where it has
// none; or backwards the gradients, from zero.
template <bool kForwards>
__global__ void __launch_bounds__(kScanThreads) scan_chunks(const __grid_constant__ ScanParams p) {
  constexpr int kAtOnce = 8;
  const BatchEntry& entry = p.batch.entries[blockIdx.y];
  const std::int64_t all = static_cast<std::int64_t>(p.in.states) * p.in.channels;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i >= all) return;
  const int channel = static_cast<int>(i % p.in.channels);
  const float rate = p.in.rate(channel, static_cast<int>(i / p.in.channels));
  float* states = kForwards ? p.workspace.h : p.workspace.dh;
  const int last = entry.first_block + entry.segments - 1;
  float* outer = kForwards && entry.state != nullptr ? entry.state + i : nullptr;
  float state = outer != nullptr ? *outer : 0;
  for (int first = 0; first < entry.segments; first += kAtOnce) {
    float sums[kAtOnce];
    float steps[kAtOnce];
    const auto chunk_at = [&](int n) -> std::int64_t {
      return kForwards ? entry.first_block + first + n : last - first - n;
    };
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n >= entry.segments) break;
      sums[n] = states[chunk_at(n) * all + i];
      steps[n] = p.workspace.steps[chunk_at(n) * p.in.channels + channel];
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n >= entry.segments) break;
      states[chunk_at(n) * all + i] = state;
      state = fmaf(exp2_of(rate * steps[n]), state, sums[n]);
    }
  }
  if (outer != nullptr) *outer = state;
}

// f(the states of a lane, a constant).
template <class F>
void with_lane_states(int states, const F& f) {
  if (states <= 4 * kLanes) {
    f(std::integral_constant<int, 4>());
  } else {
    f(std::integral_constant<int, kMaxScanStates / kLanes>());
  }
}

inline bool all_aligned(std::initializer_list<Elements> all) {
  return std::all_of(all.begin(), all.end(), [](const Elements& e) { return e.aligned(); });
}

inline int blocks_of(int channels) {
  return (channels + kChannels - 1) / kChannels;
}

// A block for each kChannels of every chunk.
template <class Params>
void launch(Context& ctx, void (*kernel)(Params), const Params& params, int channels, int chunks,
            std::size_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(blocks_of(channels)), static_cast<unsigned>(chunks));
  kernel<<<grid, kThreads, bytes, stream_of(ctx)>>>(params);
  check_launch(kOp);
}

template <bool kForwards>
void launch_scan(Context& ctx, const ScanParams& p) {
  const dim3 grid(blocks_for(static_cast<std::int64_t>(p.in.states) * p.in.channels, kScanThreads),
                  static_cast<unsigned>(p.batch.count));
  scan_chunks<kForwards><<<grid, kScanThreads, 0, stream_of(ctx)>>>(p);
  check_launch(kOp);
}

inline ScanWorkspace workspace_of(ScratchScope& scratch, const ScanInputs& in, int chunks,
                                  bool gradients) {
  const auto states = [&] { return scratch.tensor({chunks, in.states, in.channels}).f32(); };
  return {.h = states(),
          .dh = gradients ? states() : nullptr,
          .steps = scratch.tensor({chunks, in.channels}).f32()};
}

}  // namespace deltafox::cuda::scan
