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
// False for a few tokens.
bool linear_glu_f32_avx512(Context& ctx, const LinearGluArgs& args);
bool linear_glu_bf16_avx512(Context& ctx, const LinearGluArgs& args);
bool linear_glu_bf16_amx(Context& ctx, const LinearGluArgs& args);  // BF16 or kBF16Tiles
void linear_bf16_amx(Context& ctx, const LinearArgs& args);         // BF16 or kBF16Tiles
// dx [+]= dy w and dw += dyᵀ x, dy and x rounded as x is there.
void linear_backward_bf16_amx(Context& ctx, const LinearBackwardArgs& args);
#endif

// kQ8 and kQ4 weights.
void linear_packed(Context& ctx, const LinearArgs& args);
bool linear_glu_packed(Context& ctx, const LinearGluArgs& args);

// Of gate and up that are multiplied at a time.
constexpr std::int64_t kGluColumns = 64;
// y [tokens, columns of stride] = act(gate) · up, whose rows are row_floats apart; columns is a
// multiple of 16.
void store_glu(const float* gate, const float* up, std::int64_t row_floats, std::int64_t tokens,
               std::int64_t columns, Activation activation, float* y, std::int64_t stride);

}  // namespace deltafox::cpu
