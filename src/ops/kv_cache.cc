#include "ops/kv_cache.h"

namespace deltafox {

std::int64_t KvLayout::gpu_page_bytes() const {
  const std::int64_t padded = head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : 128;
  const std::int64_t floats = 2 * gate_heads + (key_norms ? kv_heads : 0);
  return kKvPage * (2 * kv_heads * padded * static_cast<std::int64_t>(size_of(dtype)) + 4 * floats);
}

KvPage::KvPage(const KvLayout& layout, bool zeroed) {
  if (layout.device != Device::kCpu) {
    block = Tensor(DType::kU8, {layout.gpu_page_bytes()}, layout.device);
    return;
  }
  const auto tensor = [&](const Shape& shape) {
    return zeroed ? Tensor(DType::kF32, shape) : Tensor::uninitialised(DType::kF32, shape);
  };
  keys = tensor({layout.kv_heads, layout.head_dim, kKvPage});
  values = tensor({layout.kv_heads, kKvPage, layout.value_stride()});
  gates = Tensor(DType::kF32, {2, layout.gate_heads, kKvPage});
  key_norms = Tensor(DType::kF32, {layout.key_norms ? layout.kv_heads : 0, kKvPage});
}

KvCache::KvCache(const KvCache& other)
    : layout_(other.layout_),
      length_(other.length_),
      first_page_(other.first_page_),
      pages_(other.pages_.begin(),
             other.pages_.begin() +
                 static_cast<std::ptrdiff_t>(other.end_page() - other.first_page_)) {
  if (length_ % kKvPage != 0) pages_.back() = std::make_shared<KvPage>(*pages_.back());
}

KvCache& KvCache::operator=(KvCache other) noexcept {
  layout_ = other.layout_;
  length_ = other.length_;
  first_page_ = other.first_page_;
  pages_ = std::move(other.pages_);
  return *this;
}

void KvCache::make_room(std::int64_t tokens, bool zeroed) {
  const std::int64_t end = length_ + tokens;
  while (room_page() < pages_for(end)) {
    const bool full = (room_page() + 1) * kKvPage <= end;
    pages_.push_back(std::make_shared<KvPage>(layout_, zeroed || !full));
  }
}

void KvCache::extend(std::int64_t tokens) {
  make_room(tokens, false);
  length_ += tokens;
}

void KvCache::reserve(std::int64_t tokens) {
  make_room(tokens, true);
}

void KvCache::drop_unseen() {
  const std::int64_t first = first_page_at(length_);
  pages_.erase(pages_.begin(), pages_.begin() + static_cast<std::ptrdiff_t>(first - first_page_));
  first_page_ = first;
}

void KvCache::grow_to(std::int64_t length) {
  first_page_ = first_page_at(length);
  make_room(length, true);
  length_ = length;
}

std::int64_t KvCache::bytes_at(std::int64_t length) const {
  const std::int64_t pages = pages_for(length) - first_page_at(length);
  if (layout_.device != Device::kCpu) return pages * layout_.gpu_page_bytes();
  const std::int64_t floats = layout_.kv_heads * (layout_.head_dim + layout_.value_stride()) +
                              2 * layout_.gate_heads + (layout_.key_norms ? layout_.kv_heads : 0);
  return pages * kKvPage * floats * 4;
}

}  // namespace deltafox
