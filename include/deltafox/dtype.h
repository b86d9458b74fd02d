// Element types of tensors, named as in safetensors files; two packed forms of weight matrices,
// whose elements lie in blocks with scales of their own (core/quantized.h, docs/quantization.md);
// and, in memory only, bfloat16 matrices in the order of a processor's tiles (ops/tile_order.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace deltafox {

enum class DType : std::uint8_t { kF32, kBF16, kF16, kI32, kI64, kU8, kQ8, kQ4, kBF16Tiles };

constexpr bool is_packed(DType dtype) {
  return dtype == DType::kQ8 || dtype == DType::kQ4;
}

// Bytes of one element; 0 for a packed form, which has none of its own.
constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kBF16Tiles:
    case DType::kF16:
      return 2;
    case DType::kI64:
      return 8;
    case DType::kU8:
      return 1;
    case DType::kQ8:
    case DType::kQ4:
      return 0;
  }
  return 0;
}

// The safetensors name: "F32", "BF16", "F16", "I32", "I64", "U8"; "Q8", "Q4" for the packed forms.
constexpr std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBF16:
    case DType::kBF16Tiles:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kI32:
      return "I32";
    case DType::kI64:
      return "I64";
    case DType::kU8:
      return "U8";
    case DType::kQ8:
      return "Q8";
    case DType::kQ4:
      return "Q4";
  }
  return "?";
}

}  // namespace deltafox
