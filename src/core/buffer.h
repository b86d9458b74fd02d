// Owned memory for tensors.
#pragma once

#include <cstddef>
#include <utility>

namespace deltafox {

// Zeroed memory, aligned to a cache line, or to a huge page where it is large enough to profit (the
// kernel is then asked for huge pages: first touch is fifty times cheaper, and streaming reads miss
// the TLB less). Copying copies the contents. Throws Error if memory cannot be had.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);
  Buffer(const Buffer& other);
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer();

  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace deltafox
