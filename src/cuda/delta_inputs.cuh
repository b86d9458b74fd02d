// What delta_inputs (ops/delta_mixer.h) computes, for kernels in which a thread walks rows of eight
// channels of q, k or v: the same bits in each of them.
#pragma once

#include "cuda/conv_window.cuh"
#include "cuda/rows.cuh"
#include "cuda/tensor_core.cuh"
#include "ops/delta_mixer.h"

namespace deltafox::cuda {

constexpr int kConvWidth = static_cast<int>(kDeltaConvWidth);
constexpr int kConvChannels = 8;  // of a thread
constexpr float kNormEps = 1e-6F;

// To about 20 bits where the result is rounded to bfloat16: __expf and __fdividef would look after
// denormal numbers, which are zeros here.
template <typename T>
__device__ float silu(float x) {
  if constexpr (sizeof(T) == 4) return x / (1 + expf(-x));
  constexpr float kLog2E = 1.4426950408889634F;
  float power;
  float quotient;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -kLog2E));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(1 + power));
  return x * quotient;
}

// Two roundings off where the result is rounded to bfloat16.
template <typename T>
__device__ float inverse_root(float x) {
  return sizeof(T) == 2 ? rsqrtf(x) : 1 / sqrtf(x);
}

// SiLU of x from `scaled` = x / kSiluScale, over kSiluScale: so the taps can have the factor that
// the exponential needs, and what follows undoes it for all elements of a row at once.
template <typename T>
constexpr float kSiluScale = sizeof(T) == 2 ? -0.693147180559945309F : 1.0F;

template <typename T>
__device__ float scaled_silu(float scaled) {
  if constexpr (sizeof(T) == 4) return silu<T>(scaled);
  float power;
  float quotient;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(scaled));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(1 + power));
  return scaled * quotient;
}

// The taps of a thread's channels, for convolve_rows.
template <typename T>
__device__ void scale_taps(float (&w)[kConvChannels][kConvWidth]) {
#pragma unroll
  for (auto& taps : w) {
#pragma unroll
    for (float& tap : taps) tap *= 1 / kSiluScale<T>;
  }
}

constexpr int kAtOnce = 2;  // rows

// Rows `first` and the next of four rows `now` through convolution and SiLU, and over the length of
// the head, if `head_lanes` share it. Of the row before them input t − 3 + i is at window
// [(t + 1 + i) % 4], where theirs are put.
template <typename T>
__device__ void convolve_rows(float (&out)[kAtOnce][kConvChannels],
                              const Eight<T> (&now)[kConvWidth], int first,
                              float (&window)[kConvWidth][kConvChannels],
                              const float (&w)[kConvChannels][kConvWidth], int head_lanes) {
  constexpr float kFactor = kSiluScale<T>;
  float squares[kAtOnce] = {};
#pragma unroll
  for (int a = 0; a < kAtOnce; ++a) {
    const int r = first + a;
    now[r].get(window[r]);
#pragma unroll
    for (int c = 0; c < kConvChannels; ++c) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kConvWidth; ++i) sum += w[c][i] * window[(r + 1 + i) % kConvWidth][c];
      out[a][c] = scaled_silu<T>(sum);
      squares[a] = fmaf(out[a][c], out[a][c], squares[a]);
    }
  }
  float scale[kAtOnce];
#pragma unroll
  for (float& factor : scale) factor = kFactor;
  if (head_lanes > 0) {
    for (int offset = head_lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (float& sum : squares) sum += __shfl_xor_sync(0xffffffff, sum, offset);
    }
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      scale[a] *= inverse_root<T>(squares[a] * (kFactor * kFactor) + kNormEps);
    }
  }
#pragma unroll
  for (int a = 0; a < kAtOnce; ++a) {
#pragma unroll
    for (float& element : out[a]) element *= scale[a];
  }
}

constexpr int kMostHeads = static_cast<int>(kDeltaInputsHeads);
constexpr int kBetaRows = 16;  // at once
constexpr int kBetaParts = 8;  // of the columns, in which sums are added up
using BetaSums = float[kBetaParts][kBetaRows][kMostHeads];  // in shared memory

struct BetaParams {
  const bf16* x;       // [T, C]
  const bf16* b_proj;  // [H, C]
  int width;           // C
  int heads;
  float* beta;  // [T, H]
};

// β of `count` rows from row `first` of x on, by a block of kWarps. Which of a lane's eight
// neighbouring columns counts as which of the tensor cores' makes no difference, as long as it is
// the same in x and b_proj.
template <int kWarps>
__device__ void beta_rows(const BetaParams& p, std::int64_t first, int count, BetaSums& all) {
  constexpr int kAhead = 6;     // steps whose loads are under way at once
  constexpr int kColumns = 32;  // of a step
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = lane / 4;
  const int steps = (p.width + kColumns - 1) / kColumns;
  const int steps_of_part = (steps + kBetaParts - 1) / kBetaParts;
  const bf16* x = p.x + first * p.width;
  __syncthreads();  // what the rows before left has been read
  for (int part = static_cast<int>(threadIdx.x) / 32; part < kBetaParts; part += kWarps) {
    const int begin = part * steps_of_part;
    const int end = min(begin + steps_of_part, steps);
    const auto load = [&](const bf16* from, int r, int rows, int step) {
      const int column = step * kColumns + lane % 4 * 8;
      if (r >= rows || column >= p.width || step >= end) return make_uint4(0, 0, 0, 0);
      return *reinterpret_cast<const uint4*>(from + static_cast<std::int64_t>(r) * p.width +
                                             column);
    };
    float sums[2][4] = {};  // of heads 0 to 7 and 8 to 15
    for (int step = begin; step < end; step += kAhead) {
      uint4 a[kAhead][2];
      uint4 b[kAhead][2];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          a[i][h] = load(x, row + 8 * h, count, step + i);
          b[i][h] = load(p.b_proj, row + 8 * h, p.heads, step + i);
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const std::uint32_t low[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y};
        const std::uint32_t high[4] = {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          mma_bf16(sums[h], low, b[i][h].x, b[i][h].y);
          mma_bf16(sums[h], high, b[i][h].z, b[i][h].w);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        all[part][row + i / 2 * 8][8 * h + 2 * (lane % 4) + i % 2] = sums[h][i];
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count * p.heads; i += 32 * kWarps) {
    const int r = i / p.heads;
    const int head = i % p.heads;
    float logit = 0;
#pragma unroll
    for (const auto& part : all) logit += part[r][head];
    p.beta[first * p.heads + i] = sigmoid(logit);
  }
}

}  // namespace deltafox::cuda
