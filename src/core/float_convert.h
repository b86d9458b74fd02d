// bfloat16 and IEEE half to float32 and back. Widening is exact; narrowing rounds to nearest even
// and keeps NaN a NaN.
#pragma once

#include <bit>
#include <cstdint>
#include <span>

#include "core/tensor.h"

namespace deltafox {

inline float bf16_to_f32(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

inline std::uint16_t f32_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

float f16_to_f32(std::uint16_t bits);
std::uint16_t f32_to_f16(float value);

// Element i of an F32, BF16 or F16 view.
float load_f32(const ConstTensorView& view, std::int64_t i);

// Elements [begin, begin + to.size()) of an F32, BF16 or F16 view, widened.
void to_f32(const ConstTensorView& from, std::int64_t begin, std::span<float> to);

// All elements of `from`, an F32, BF16 or F16 view, as the dtype of `to`, another of these.
void convert(const ConstTensorView& from, const TensorView& to);

}  // namespace deltafox
