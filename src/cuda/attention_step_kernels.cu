// A warp a row of q, k or v, and one for the gates.
#include "cuda/attention_step_kernels.h"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kWarps = 4;

template <int kDim>
__global__ void __launch_bounds__(kWarps * 32) step_inputs(const __grid_constant__ StepInputs p) {
  constexpr int kPerLane = kDim / 32;
  constexpr int kHalf = kPerLane / 2;  // the other of a pair is so many elements on
  constexpr int kSize = 8;             // elements of a chunk of a page
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int b = static_cast<int>(blockIdx.y);
  const int keys = p.layout.kv_heads;
  const int row = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  wait_for_input();
  if (row > p.heads + 2 * keys) return;
  KvSequence sequence = p.sequences[b];
  sequence.advance(p.recorded_runs);
  const int position = sequence.length - 1;
  std::byte* page = sequence.page(position / kPageTokens);
  const int t = position % kPageTokens;

  if (row == p.heads + 2 * keys) {
    for (int h = lane; h < p.layout.gate_heads; h += 32) {
      double sum = 0;
      if (position > 0) {
        const std::byte* before = sequence.page((position - 1) / kPageTokens);
        const int at = (position - 1) % kPageTokens;
        sum = static_cast<double>(reinterpret_cast<const float*>(before + p.layout.gates(h))[at]) +
              reinterpret_cast<const float*>(before + p.layout.low_gates(h))[at];
      }
      const float x = (p.gates == nullptr ? 0 : p.gates[b * p.heads + h]) + p.gate_bias[h];
      sum += fminf(x, 0) - log1pf(expf(-fabsf(x)));
      const auto high = static_cast<float>(sum);
      reinterpret_cast<float*>(page + p.layout.gates(h))[t] = high;
      reinterpret_cast<float*>(page + p.layout.low_gates(h))[t] =
          static_cast<float>(sum - static_cast<double>(high));
    }
    return;
  }

  const bool is_q = row < p.heads;
  const bool is_k = !is_q && row < p.heads + keys;
  const int head = is_q ? row : is_k ? row - p.heads : row - p.heads - keys;
  const int all = is_q ? p.heads : keys;
  const float* x = (is_q ? p.q : is_k ? p.k : p.v) + (b * all + head) * kDim;
  float own[kPerLane];
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) own[e] = x[e * 32 + lane];
  const float* alphas = is_q ? nullptr : is_k ? p.k_alpha : p.v_alpha;
  if (alphas != nullptr) {
    float* state = (is_k ? p.k_states : p.v_states)[b] + head * kDim;
    const float alpha = alphas[b * keys + head];
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      const float before = state[e * 32 + lane];
      state[e * 32 + lane] = own[e];
      own[e] = alpha * before + (1 - alpha) * own[e];
    }
  }
  if (is_q || is_k) {
    const float* norm = is_q ? p.q_norm : p.k_norm;
    if (norm != nullptr) {
      norm += head * (is_q ? p.q_norm_stride : p.k_norm_stride);
      float sum = 0;
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) sum = fmaf(own[e], own[e], sum);
      const float scale = 1 / sqrtf(warp_sum(sum) / kDim + p.eps);
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) own[e] = own[e] * scale * norm[e * 32 + lane];
    }
    if (p.frequencies != nullptr) {
#pragma unroll
      for (int e = 0; e < kHalf; ++e) {
        float sine;
        float cosine;
        sincosf(static_cast<float>(position) * p.frequencies[e * 32 + lane], &sine, &cosine);
        const float low = own[e] * cosine - own[e + kHalf] * sine;
        own[e + kHalf] = own[e] * sine + own[e + kHalf] * cosine;
        own[e] = low;
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    const int d = e * 32 + lane;
    const bf16 rounded = __float2bfloat16(own[e]);
    if (is_q) {
      p.q_out[(b * p.heads + head) * kDim + d] = rounded;
    } else if (is_k) {
      reinterpret_cast<bf16*>(page + p.layout.keys(head) +
                              key_chunk<bf16>(d, t / kSize))[t % kSize] = rounded;
    } else {
      reinterpret_cast<bf16*>(page + p.layout.values(head) +
                              value_chunk<bf16, kDim>(t, d / kSize))[d % kSize] = rounded;
    }
  }
}

}  // namespace

void launch_step_inputs(Context& ctx, const StepInputs& inputs, std::int64_t batch) {
  const int rows = inputs.heads + 2 * inputs.layout.kv_heads + 1;
  const dim3 grid(static_cast<unsigned>((rows + kWarps - 1) / kWarps),
                  static_cast<unsigned>(batch));
  launch_dependent(ctx, "attention_step",
                   inputs.layout.dim == 64 ? step_inputs<64> : step_inputs<128>, grid, kWarps * 32,
                   0, inputs);
}

}  // namespace deltafox::cuda
