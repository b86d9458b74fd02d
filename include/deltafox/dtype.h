// Element types of tensors, named as in safetensors files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace deltafox {

enum class DType : std::uint8_t { kF32, kBF16, kF16, kI32, kI64, kU8 };

// Bytes of one element.
constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kI64:
      return 8;
    case DType::kU8:
      return 1;
  }
  return 0;
}

// The safetensors name: "F32", "BF16", "F16", "I32", "I64", "U8".
constexpr std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBF16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kI32:
      return "I32";
    case DType::kI64:
      return "I64";
    case DType::kU8:
      return "U8";
  }
  return "?";
}

}  // namespace deltafox
