// The kernels behind cpu::linear, one for each way that weights are kept. All add: y = y + x wᵀ
// where args.accumulate, and none reads args.bias.
#pragma once

#include "ops/linear.h"

namespace deltafox::cpu {

// x rounded to bfloat16, as float32.
ConstTensorView rounded_to_bf16(Context& ctx, ScratchScope& scratch, const ConstTensorView& x);

// F32, BF16 and F16 weights, widened to float32 as they are read; by Highway.
void linear_widened(Context& ctx, const LinearArgs& args);

#if defined(__x86_64__)
// For processors that have them (cpu/isa.h). With BF16 weights they round x themselves.
void linear_f32_avx512(Context& ctx, const LinearArgs& args);
void linear_bf16_avx512(Context& ctx, const LinearArgs& args);
void linear_bf16_amx(Context& ctx, const LinearArgs& args);
// dx [+]= dy w and dw += dyᵀ x, dy and x rounded as x is there.
void linear_backward_bf16_amx(Context& ctx, const LinearBackwardArgs& args);
#endif

// kQ8 and kQ4 weights.
void linear_packed(Context& ctx, const LinearArgs& args);

}  // namespace deltafox::cpu
