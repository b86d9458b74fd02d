#include "core/buffer.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "core/device.h"
#include "core/error.h"

namespace deltafox {
namespace {

constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

constexpr bool mapped(std::size_t bytes) {
  return bytes >= kHugePage;
}

// Anonymous pages come zeroed, so a large buffer costs nothing until it is touched.
std::byte* map_pages(std::size_t bytes) {
  // Over-allocate, then cut to a huge-page boundary.
  const std::size_t reserve = bytes + kHugePage;
  void* base = mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(base);
  const std::size_t head =
      (kHugePage - reinterpret_cast<std::uintptr_t>(begin) % kHugePage) % kHugePage;
  if (head != 0) munmap(begin, head);
  const std::size_t page = 4096;
  const std::size_t used = (bytes + page - 1) / page * page;
  if (reserve - head > used) munmap(begin + head + used, reserve - head - used);
  madvise(begin + head, used, MADV_HUGEPAGE);  // best effort
  return begin + head;
}

}  // namespace

Buffer::Buffer(std::size_t bytes, Device device) : size_(bytes), device_(device) {
  if (bytes == 0) return;
  if (device == Device::kCuda) {
    data_ = static_cast<std::byte*>(cuda::allocate(bytes));
    return;
  }
  if (mapped(bytes)) {
    data_ = map_pages(bytes);
  } else {
    const std::size_t rounded = (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
    data_ = static_cast<std::byte*>(std::aligned_alloc(kCacheLine, rounded));
    if (data_ != nullptr) std::memset(data_, 0, rounded);
  }
  if (data_ == nullptr) fail("out of memory: {} bytes could not be allocated", bytes);
}

Buffer::Buffer(const Buffer& other) : Buffer(other.size_, other.device_) {
  if (size_ == 0) return;
  if (device_ == Device::kCuda) {
    cuda::copy(data_, other.data_, size_);
  } else {
    std::memcpy(data_, other.data_, size_);
  }
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  if (device_ == Device::kCuda) {
    cuda::release(data_, size_);
  } else if (mapped(size_)) {
    munmap(data_, size_);
  } else {
    std::free(data_);
  }
}

}  // namespace deltafox
