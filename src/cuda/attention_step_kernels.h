// What comes before the attention in attention_step. See ops/attention_step.h.
#pragma once

#include <cuda_bf16.h>

#include "core/context.h"
#include "cuda/kv_pages.cuh"

namespace deltafox::cuda {

struct StepInputs {
  const float* q;  // [B, H, D]
  const float* k;  // [B, G, D]
  const float* v;
  const float* k_alpha;  // [B, G] or null
  const float* v_alpha;
  float* const* k_states;  // [B]
  float* const* v_states;
  const float* q_norm;  // [D] or [H·D], or null
  const float* k_norm;
  int q_norm_stride;  // D or 0
  int k_norm_stride;
  float eps;
  const float* frequencies;     // [D / 2] or null
  const float* gates;           // [B, H] or null
  const float* gate_bias;       // [H] or null
  const KvSequence* sequences;  // [B]
  const std::int32_t* recorded_runs;
  KvPageLayout layout;
  int heads;
  __nv_bfloat16* q_out;  // [B, H, D]
};

void launch_step_inputs(Context& ctx, const StepInputs& inputs, std::int64_t batch);

}  // namespace deltafox::cuda
