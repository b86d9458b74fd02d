#include "core/tensor.h"

#include <fmt/format.h>

#include <cstring>

#include "core/device.h"
#include "core/quantized.h"

namespace deltafox {

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (int i = 0; i < shape.rank(); ++i) text += fmt::format("{}{}", i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

std::size_t bytes_of(DType dtype, const Shape& shape) {
  if (!is_packed(dtype)) return static_cast<std::size_t>(shape.size()) * size_of(dtype);
  const PackedLayout layout(dtype, shape[0], shape[1]);
  return static_cast<std::size_t>(layout.bytes());
}

void Tensor::read_from(const void* host) {
  if (bytes() == 0) return;
  if (device() == Device::kCuda) return cuda::copy(buffer_.data(), host, bytes());
  std::memcpy(buffer_.data(), host, bytes());
}

void Tensor::write_to(void* host) const {
  if (bytes() == 0) return;
  if (device() == Device::kCuda) return cuda::copy(host, buffer_.data(), bytes());
  std::memcpy(host, buffer_.data(), bytes());
}

}  // namespace deltafox
