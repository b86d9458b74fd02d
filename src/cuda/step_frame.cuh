// What kernels of step_linear (ops/step.h) share, whatever form the weights have: parts and tiles,
// x staged in shared memory, what becomes of the sums.
#pragma once

#include <cuda_bf16.h>

#include "cuda/launch.cuh"
#include "cuda/packed.cuh"
#include "cuda/rows.cuh"
#include "ops/step.h"

namespace deltafox::cuda::step {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlock = 32;                // elements of K that a warp takes at once
constexpr int kBlocks = kBlock * kWarps;  // all warps
constexpr int kParts = static_cast<int>(kStepLinearParts);
// Elements behind each row of x in shared memory: two rows of four lanes hit all banks once.
constexpr int kPadding = 32;
constexpr int kPrefetchBytes = 96 << 10;  // into the L2 cache, by each thread block

struct Part {
  const void* w;
  void* y;
  const float4* conv;          // [N]
  const float* conv_bias;      // [N] or null
  float4* const* conv_states;  // [B] in device memory, each [N]
  int rows;                    // N
  int stride;                  // N'
  int end_group;               // of tiles, over all parts so far
  bool y_is_bf16;
  StepEpilogue epilogue;
};

struct Params {
  const void* x;
  const float* norm;
  float norm_eps;
  int norm_width;  // 0: none
  bool x_is_bf16;
  bool x_is_aligned;  // rows of x are whole vectors
  int batch;
  int k;
  int staged;  // K rounded up to whole kBlocks: what is beyond K is zero
  int groups;  // in all
  Part parts[kParts];
};

// A thread block's next tile: with kGlu each group is two tiles, the gate's rows and up's.
template <int kTileRows>
struct Tile {
  int part = 0;
  int group;
  int half = 0;

  __device__ Tile(const Params& p, int first) : group(first) { find_part(p); }
  __device__ bool exists(const Params& p) const { return group < p.groups; }
  __device__ void find_part(const Params& p) {
    while (exists(p) && group >= p.parts[part].end_group) ++part;
  }
  __device__ void next(const Params& p) {
    if (p.parts[part].epilogue == StepEpilogue::kGlu && half == 0) {
      half = 1;
      return;
    }
    half = 0;
    group += static_cast<int>(gridDim.x);
    find_part(p);
  }
  __device__ int first_row(const Params& p) const {
    return (group - (part == 0 ? 0 : p.parts[part - 1].end_group)) * kTileRows;
  }
};

// x to shared memory [kRows][staged + kPadding], normed; zeros behind the batch and behind K. What
// waits for memory is loaded before any of it is used: there is little else to do meanwhile. With a
// norm K is whole kBlocks.
template <int kRows>
__device__ void stage_input(const Params& p, bf16* staged) {
  constexpr int kKept = 12;  // vectors of a row that a lane keeps
  const int stride = p.staged + kPadding;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const auto load = [&](float(&v)[4], int b, int i) {
    const std::int64_t at = static_cast<std::int64_t>(b) * p.k + i;
    const int count = p.x_is_aligned && i < p.k ? kVector : min(4, p.k - i);
    if (b >= p.batch) {
      v[0] = v[1] = v[2] = v[3] = 0;
    } else if (p.x_is_bf16) {
      load_four(v, static_cast<const bf16*>(p.x) + at, count);
    } else {
      load_four(v, static_cast<const float*>(p.x) + at, count);
    }
  };
  if (p.norm_width == p.k) {  // a warp a row
    for (int b = warp; b < kRows; b += kWarps) {
      float kept[kKept][4];
#pragma unroll
      for (int n = 0; n < kKept; ++n) {
        if ((n * 32 + lane) * 4 < p.k) load(kept[n], b, (n * 32 + lane) * 4);
      }
      float sum = 0;
      const auto add = [&](const float(&v)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum = fmaf(v[e], v[e], sum);
      };
#pragma unroll
      for (int n = 0; n < kKept; ++n) {
        if ((n * 32 + lane) * 4 < p.k) add(kept[n]);
      }
      for (int i = (kKept * 32 + lane) * 4; i < p.k; i += 128) {
        float v[4];
        load(v, b, i);
        add(v);
      }
      const float scale = 1 / sqrtf(warp_sum(sum) / static_cast<float>(p.k) + p.norm_eps);
      const auto store = [&](float(&v)[4], int i) {
        float w[4];
        load_four(w, p.norm + i, kVector);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = v[e] * scale * w[e];
        store_four(staged + b * stride + i, v, kVector);
      };
#pragma unroll
      for (int n = 0; n < kKept; ++n) {
        if ((n * 32 + lane) * 4 < p.k) store(kept[n], (n * 32 + lane) * 4);
      }
      for (int i = (kKept * 32 + lane) * 4; i < p.k; i += 128) {
        float v[4];
        load(v, b, i);
        store(v, i);
      }
    }
    __syncthreads();
    return;
  }
  // A warp's turn is 128 elements of a row: one group of a norm in groups.
  constexpr int kTurns = 4;  // at a time
  const int turns_of_a_row = p.staged / 128;
  const int turns = kRows * turns_of_a_row;
  for (int first = warp; first < turns; first += kWarps * kTurns) {
    float v[kTurns][4];
#pragma unroll
    for (int n = 0; n < kTurns; ++n) {
      const int turn = first + n * kWarps;
      if (turn < turns) load(v[n], turn / turns_of_a_row, turn % turns_of_a_row * 128 + lane * 4);
    }
#pragma unroll
    for (int n = 0; n < kTurns; ++n) {
      const int turn = first + n * kWarps;
      if (turn >= turns) continue;
      const int i = turn % turns_of_a_row * 128 + lane * 4;
      if (p.norm_width != 0) {
        const float sum =
            warp_sum(v[n][0] * v[n][0] + v[n][1] * v[n][1] + v[n][2] * v[n][2] + v[n][3] * v[n][3]);
        const float scale = 1 / sqrtf(sum / static_cast<float>(kStepHeadDim) + p.norm_eps);
        float w[4];
        load_four(w, p.norm + lane * 4, kVector);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[n][e] = v[n][e] * scale * w[e];
      }
      store_four(staged + turn / turns_of_a_row * stride + i, v[n], kVector);
    }
  }
  __syncthreads();
}

// What becomes of the product of row b of x and row `column` of a tile.
template <typename Tile>
__device__ void finish(const Params& p, const Tile& tile, int b, int column, float sum,
                       float& held) {
  const Part& part = p.parts[tile.part];
  const int row = tile.first_row(p) + column;
  if (b >= p.batch || row >= part.rows) return;
  const std::int64_t at = static_cast<std::int64_t>(b) * part.stride + row;
  switch (part.epilogue) {
    case StepEpilogue::kStore:
      break;
    case StepEpilogue::kAdd:
      sum += part.y_is_bf16 ? to_float(static_cast<const bf16*>(part.y)[at])
                            : static_cast<const float*>(part.y)[at];
      break;
    case StepEpilogue::kSigmoid:
      sum = sigmoid(sum);
      break;
    case StepEpilogue::kGlu:
      if (tile.half == 0) {
        held = sum;
        return;
      }
      sum *= held * sigmoid(held);
      break;
    case StepEpilogue::kConvSilu: {
      float4* state = part.conv_states[b] + row;
      const float4 old = *state;
      const float4 w = part.conv[row];
      *state = make_float4(old.y, old.z, old.w, sum);
      sum = fmaf(w.w, sum, fmaf(w.z, old.w, fmaf(w.y, old.z, w.x * old.y)));
      if (part.conv_bias != nullptr) sum += part.conv_bias[row];
      sum *= sigmoid(sum);
      break;
    }
  }
  if (part.y_is_bf16) {
    static_cast<bf16*>(part.y)[at] = __float2bfloat16(sum);
  } else {
    static_cast<float*>(part.y)[at] = sum;
  }
}

// Bytes of shared memory.
inline std::size_t staged_bytes(int batch, int staged) {
  return static_cast<std::size_t>(batch > 8 ? 16 : 8) *
         static_cast<std::size_t>(staged + kPadding) * sizeof(bf16);
}

// `blocks` thread blocks a multiprocessor.
inline void launch_frame(Context& ctx, void (*kernel)(Params), const Params& p, int blocks) {
  const std::size_t shared = staged_bytes(p.batch, p.staged);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        "cudaFuncSetAttribute");
  const int grid = std::min(p.groups, blocks * ctx.stream().multiprocessors());
  launch_dependent(ctx, "step_linear", kernel, dim3(static_cast<unsigned>(grid)), kThreads, shared,
                   p);
}

}  // namespace deltafox::cuda::step
