// Whole safetensors files. What the reader lets through must tile the data exactly.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "deltafox/error.h"
#include "io/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace deltafox;
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  try {
    const io::SafetensorsHeader header = io::parse_safetensors(file, "fuzz");
    std::size_t total = 0;
    for (const io::TensorEntry& tensor : header.tensors) {
      if (tensor.data < file.data() || tensor.bytes > size) __builtin_trap();
      if (tensor.data + tensor.bytes > file.data() + size) __builtin_trap();
      std::int64_t elements = 1;
      for (const std::int64_t dim : tensor.shape) elements *= dim;  // must not overflow
      if (tensor.dtype &&
          static_cast<std::size_t>(elements) * size_of(*tensor.dtype) != tensor.bytes) {
        __builtin_trap();
      }
      total += tensor.bytes;
    }
    std::uint64_t length = 0;
    std::copy_n(data, sizeof length, reinterpret_cast<std::uint8_t*>(&length));
    if (8 + length + total != size) __builtin_trap();
    const auto by_name = [](const auto& a, const auto& b) { return a.name < b.name; };
    if (!std::is_sorted(header.tensors.begin(), header.tensors.end(), by_name)) __builtin_trap();
  } catch (const Error& error) {
    if (std::string_view(error.what()).find('\n') != std::string_view::npos) __builtin_trap();
  }
  return 0;
}
