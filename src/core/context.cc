#include "core/context.h"

#include <algorithm>
#include <cstring>

namespace deltafox {
namespace {
constexpr std::size_t kAlignment = 256;
constexpr std::size_t kMinBlock = std::size_t{1} << 20;
}  // namespace

std::byte* Scratch::allocate(std::size_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (growing_) {
    used_ += bytes;
    grown_ = std::max(grown_, used_);
    return cuda::grow(*growing_, grown_) + (used_ - bytes);
  }
  if (blocks_.empty() || used_ + bytes > blocks_[block_].size()) {
    // Blocks behind the one in use are unused: what they hold has been released.
    blocks_.resize(blocks_.empty() ? 0 : block_ + 1);
    blocks_.emplace_back(std::max({bytes, capacity(), kMinBlock}), device_);
    block_ = blocks_.size() - 1;
    used_ = 0;
  }
  std::byte* result = blocks_[block_].data() + used_;
  used_ += bytes;
  return result;
}

void Scratch::release(Mark mark) {
  block_ = mark.block;
  used_ = mark.used;
  if (block_ == 0 && used_ == 0 && blocks_.size() > 1) {
    // Nothing is in use: replace the pieces by one block that holds what they held together.
    const std::size_t total = capacity();
    blocks_.clear();
    blocks_.emplace_back(total, device_);
  }
}

std::size_t Scratch::capacity() const {
  std::size_t total = grown_;
  for (const Buffer& block : blocks_) total += block.size();
  return total;
}

void Context::copy(void* to, const void* from, std::size_t bytes) {
  if (stream_) {
    cuda::copy(*stream_, to, from, bytes);
  } else {
    std::memcpy(to, from, bytes);
  }
}

void Context::zero(void* memory, std::size_t bytes) {
  if (stream_) {
    cuda::zero(*stream_, memory, bytes);
  } else {
    std::memset(memory, 0, bytes);
  }
}

}  // namespace deltafox
