#include "core/float_convert.h"

#include <cassert>
#include <cmath>
#include <cstring>

namespace deltafox {

float f16_to_f32(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fU;
  const std::uint32_t mantissa = bits & 0x3ffU;
  if (exponent == 0) {  // zero or subnormal: mantissa · 2⁻²⁴
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
  }
  if (exponent == 0x1fU) return std::bit_cast<float>(sign | 0x7f800000U | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

std::uint16_t f32_to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U)
    return static_cast<std::uint16_t>(sign | 0x7e00U | ((magnitude >> 13) & 0x3ffU));
  if (magnitude >= 0x477ff000U)
    return static_cast<std::uint16_t>(sign | 0x7c00U);  // rounds to ≥ 2¹⁶
  if (magnitude < 0x38800000U) {  // below the smallest normal half: a multiple of 2⁻²⁴
    const float scaled = std::ldexp(std::bit_cast<float>(magnitude), 24);
    return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(std::nearbyint(scaled)));
  }
  const std::uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
}

float load_f32(const ConstTensorView& view, std::int64_t i) {
  switch (view.dtype) {
    case DType::kBF16:
      return bf16_to_f32(static_cast<const std::uint16_t*>(view.data)[i]);
    case DType::kF16:
      return f16_to_f32(static_cast<const std::uint16_t*>(view.data)[i]);
    default:
      return view.f32()[i];
  }
}

void to_f32(const ConstTensorView& from, std::int64_t begin, std::span<float> to) {
  if (from.dtype == DType::kF32) {
    std::memcpy(to.data(), from.f32() + begin, to.size_bytes());
    return;
  }
  const auto* bits = static_cast<const std::uint16_t*>(from.data) + begin;
  if (from.dtype == DType::kBF16) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] = bf16_to_f32(bits[i]);
  } else {
    assert(from.dtype == DType::kF16);
    for (std::size_t i = 0; i < to.size(); ++i) to[i] = f16_to_f32(bits[i]);
  }
}

void convert(const ConstTensorView& from, const TensorView& to) {
  assert(from.shape.size() == to.shape.size());
  const std::int64_t size = from.shape.size();
  if (from.dtype == to.dtype) {
    std::memcpy(to.data, from.data, static_cast<std::size_t>(size) * size_of(to.dtype));
  } else if (to.dtype == DType::kF32) {
    to_f32(from, 0, {to.f32(), static_cast<std::size_t>(size)});
  } else {
    auto* bits = static_cast<std::uint16_t*>(to.data);
    const auto narrow = to.dtype == DType::kBF16 ? f32_to_bf16 : f32_to_f16;
    for (std::int64_t i = 0; i < size; ++i) bits[i] = narrow(load_f32(from, i));
  }
}

}  // namespace deltafox
