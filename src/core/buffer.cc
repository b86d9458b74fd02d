#include "core/buffer.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "core/device.h"
#include "core/error.h"

namespace deltafox {
namespace {

constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Anonymous pages come zeroed, so what is as large as this costs nothing until it is touched.
constexpr bool mapped(std::size_t bytes) {
  return bytes >= 64 * kPage;
}

std::byte* map_pages(std::size_t bytes) {
  const std::size_t used = (bytes + kPage - 1) / kPage * kPage;
  // To begin at a huge page, over-allocate and cut.
  const std::size_t spare = bytes >= kHugePage ? kHugePage : 0;
  const std::size_t reserve = used + spare;
  void* base = mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(base);
  if (spare == 0) return begin;
  const std::size_t head =
      (kHugePage - reinterpret_cast<std::uintptr_t>(begin) % kHugePage) % kHugePage;
  if (head != 0) munmap(begin, head);
  if (reserve - head > used) munmap(begin + head + used, reserve - head - used);
  madvise(begin + head, used, MADV_HUGEPAGE);  // best effort
  return begin + head;
}

// Of the host, zeroed if asked for.
std::byte* allocate(std::size_t bytes, bool zeroed) {
  std::byte* data = nullptr;
  if (mapped(bytes)) {
    data = map_pages(bytes);
  } else {
    const std::size_t rounded = (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
    data = static_cast<std::byte*>(std::aligned_alloc(kCacheLine, rounded));
    if (data != nullptr && zeroed) std::memset(data, 0, rounded);
  }
  if (data == nullptr) fail("out of memory: {} bytes could not be allocated", bytes);
  return data;
}

}  // namespace

Buffer::Buffer(std::size_t bytes, Device device) : size_(bytes), device_(device) {
  if (bytes == 0) return;
  data_ = device == Device::kCuda ? static_cast<std::byte*>(cuda::allocate(bytes))
                                  : allocate(bytes, true);
}

Buffer::Buffer(const Buffer& other) : size_(other.size_), device_(other.device_) {
  if (size_ == 0) return;
  if (device_ == Device::kCuda) {
    data_ = static_cast<std::byte*>(cuda::allocate(size_));
    cuda::copy(data_, other.data_, size_);
  } else {
    data_ = allocate(size_, false);
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
