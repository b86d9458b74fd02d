#include "ops/kv_cache.h"

namespace deltafox {
namespace {

constexpr std::int64_t pages_for(std::int64_t length) {
  return (length + kKvPage - 1) / kKvPage;
}

}  // namespace

KvPage::KvPage(const KvLayout& layout)
    : keys(DType::kF32, {layout.kv_heads, layout.head_dim, kKvPage}),
      values(DType::kF32, {layout.kv_heads, kKvPage, layout.value_stride()}),
      gates(DType::kF32, {2, layout.gate_heads, kKvPage}),
      key_norms(DType::kF32, {layout.key_norms ? layout.kv_heads : 0, kKvPage}) {}

KvCache::KvCache(const KvCache& other)
    : layout_(other.layout_),
      length_(other.length_),
      first_page_(other.first_page_),
      pages_(other.pages_) {
  if (length_ % kKvPage != 0) pages_.back() = std::make_shared<KvPage>(*pages_.back());
}

KvCache& KvCache::operator=(KvCache other) noexcept {
  layout_ = other.layout_;
  length_ = other.length_;
  first_page_ = other.first_page_;
  pages_ = std::move(other.pages_);
  return *this;
}

void KvCache::extend(std::int64_t tokens) {
  length_ += tokens;
  while (end_page() < pages_for(length_)) pages_.push_back(std::make_shared<KvPage>(layout_));
}

void KvCache::drop_unseen() {
  const std::int64_t first = first_page_at(length_);
  pages_.erase(pages_.begin(), pages_.begin() + static_cast<std::ptrdiff_t>(first - first_page_));
  first_page_ = first;
}

void KvCache::grow_to(std::int64_t length) {
  first_page_ = first_page_at(length);
  extend(length);
}

std::int64_t KvCache::bytes_at(std::int64_t length) const {
  const std::int64_t pages = pages_for(length) - first_page_at(length);
  const std::int64_t floats = layout_.kv_heads * (layout_.head_dim + layout_.value_stride()) +
                              2 * layout_.gate_heads + (layout_.key_norms ? layout_.kv_heads : 0);
  return pages * kKvPage * floats * 4;
}

}  // namespace deltafox
