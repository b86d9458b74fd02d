#include "core/buffer.h"

#include <sys/mman.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <vector>

#include "core/device.h"
#include "core/error.h"

namespace deltafox {
namespace {

constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t round_up(std::size_t n, std::size_t to) {
  return (n + to - 1) / to * to;
}

// Anonymous pages from the beginning of a huge page on, or null. They come zeroed and cost nothing
// until they are touched.
std::byte* map_pages(std::size_t bytes) {
  // Over-allocate, then cut to a huge-page boundary.
  const std::size_t used = round_up(bytes, kPage);
  const std::size_t reserve = used + kHugePage;
  void* base = mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(base);
  const std::size_t head =
      (kHugePage - reinterpret_cast<std::uintptr_t>(begin) % kHugePage) % kHugePage;
  if (head != 0) munmap(begin, head);
  if (reserve - head > used) munmap(begin + head + used, reserve - head - used);
  madvise(begin + head, used, MADV_HUGEPAGE);  // best effort
  return begin + head;
}

constexpr bool mapped(std::size_t bytes) {
  return bytes >= kHugePage;
}

// Blocks too small for huge pages of their own but large enough that the faults of small ones would
// take longer than what is done with them: states, and pages of caches. They are cut from chunks of
// huge pages, each for blocks of one size. Chunks whose blocks have all been given back are kept
// for the next, as touching new memory may take as long as filling it; the system may take from
// them what it needs.
class Blocks {
 public:
  static constexpr bool takes(std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    return false;  // an allocation of its own is better watched
#elif defined(__has_feature)
    return !__has_feature(address_sanitizer) && bytes >= kLeast && !mapped(bytes);
#else
    return bytes >= kLeast && !mapped(bytes);
#endif
  }

  // Null if there is no memory.
  std::byte* allocate(std::size_t bytes, bool zeroed) {
    const std::size_t size = round_up(bytes, kPage);
    const std::scoped_lock lock(mutex_);
    std::set<std::byte*>& with_room = with_room_[size];
    if (with_room.empty()) {
      const std::uint64_t all = (std::uint64_t{1} << (kChunk / size)) - 1;
      std::byte* begin = nullptr;
      std::uint64_t touched = 0;
      if (kept_.empty()) {
        begin = map_pages(kChunk);
        if (begin == nullptr) return nullptr;
      } else {
        begin = kept_.back();
        kept_.pop_back();
        touched = all;
      }
      chunks_[begin] = {.block_bytes = size, .all = all, .free = all, .touched = touched};
      with_room.insert(begin);
    }
    std::byte* const begin = *with_room.begin();
    Chunk& chunk = chunks_[begin];
    const int index = std::countr_zero(chunk.free);
    const std::uint64_t bit = std::uint64_t{1} << index;
    std::byte* const block = begin + static_cast<std::size_t>(index) * size;
    if (zeroed && (chunk.touched & bit) != 0) std::memset(block, 0, size);
    chunk.free &= ~bit;
    chunk.touched |= bit;
    if (chunk.free == 0) with_room.erase(begin);
    return block;
  }

  void release(std::byte* block) {
    const std::scoped_lock lock(mutex_);
    const auto found = std::prev(chunks_.upper_bound(block));
    std::byte* const begin = found->first;
    Chunk& chunk = found->second;
    std::set<std::byte*>& with_room = with_room_[chunk.block_bytes];
    chunk.free |= std::uint64_t{1} << (static_cast<std::size_t>(block - begin) / chunk.block_bytes);
    with_room.insert(begin);
    if (chunk.free != chunk.all) return;
    with_room.erase(begin);
    chunks_.erase(found);
    if (kept_.size() < kMostKept && madvise(begin, kChunk, MADV_FREE) == 0) {
      kept_.push_back(begin);
    } else {
      munmap(begin, kChunk);
    }
  }

 private:
  static constexpr std::size_t kLeast = std::size_t{256} << 10;
  static constexpr std::size_t kChunk = 4 * kHugePage;
  static_assert(kChunk / kLeast < 64);
  static constexpr std::size_t kMostKept = (std::size_t{1} << 30) / kChunk;

  // Sets of blocks, one a bit.
  struct Chunk {
    std::size_t block_bytes = 0;
    std::uint64_t all = 0;
    std::uint64_t free = 0;
    std::uint64_t touched = 0;  // used before: not zero any more
  };

  std::mutex mutex_;
  std::map<std::byte*, Chunk> chunks_;                     // by where they begin
  std::map<std::size_t, std::set<std::byte*>> with_room_;  // of them, by the size of their blocks
  std::vector<std::byte*> kept_;
};

// Never destroyed: buffers of static storage may outlive what is.
Blocks& blocks() {
  static auto* const all = new Blocks;
  return *all;
}

// Of the host, zeroed if asked for.
std::byte* allocate(std::size_t bytes, bool zeroed) {
  std::byte* data = nullptr;
  if (mapped(bytes)) {
    data = map_pages(bytes);
  } else if (Blocks::takes(bytes)) {
    data = blocks().allocate(bytes, zeroed);
  } else {
    const std::size_t rounded = round_up(bytes, kCacheLine);
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

Buffer Buffer::uninitialised(std::size_t bytes) {
  Buffer result;
  result.size_ = bytes;
  if (bytes > 0) result.data_ = allocate(bytes, false);
  return result;
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
  } else if (Blocks::takes(size_)) {
    blocks().release(data_);
  } else {
    std::free(data_);
  }
}

}  // namespace deltafox
