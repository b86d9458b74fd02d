// Owned memory for tensors.
#pragma once

#include <cstddef>
#include <utility>

#include "deltafox/device.h"

namespace deltafox {

// Memory, zeroed unless said otherwise, aligned to a cache line, or to a huge page where it is
// large enough to profit (the kernel is then asked for huge pages: first touch is fifty times
// cheaper, and streaming reads miss the TLB less); on a GPU see core/device.h. Copying copies the
// contents. Throws Error if memory cannot be had.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes, Device device = Device::kCpu);
  // Of the host, with anything in it.
  static Buffer uninitialised(std::size_t bytes);
  Buffer(const Buffer& other);
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        device_(other.device_) {}
  Buffer& operator=(Buffer other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(device_, other.device_);
    return *this;
  }
  ~Buffer();

  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  Device device() const { return device_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  Device device_ = Device::kCpu;
};

}  // namespace deltafox
