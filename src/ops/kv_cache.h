// One sequence's keys, values and forget gates, as attention reads them.
//
// They lie in pages of kKvPage tokens. A full page never changes again, and copies of a cache share
// it; the last page, while it is filled, is each copy's own. So copying a cache costs one page, and
// copies may be used from several threads. With a sliding window, pages that no later query can see
// are dropped.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/tensor.h"

namespace deltafox {

constexpr std::int64_t kKvPage = 64;  // tokens of a page

struct KvLayout {
  std::int64_t kv_heads;  // G
  std::int64_t head_dim;  // D
  // H of the forget gates; 0 if there are none.
  std::int64_t gate_heads = 0;
  // Whether to keep the greatest norm of the keys so far, which bounds scores.
  bool key_norms = false;
  std::optional<std::int64_t> window = {};  // positions a query sees, its own included
  Device device = Device::kCpu;
  DType dtype = DType::kF32;  // of keys and values; BF16 on a GPU only

  // Values are padded with zeros to whole vectors.
  std::int64_t value_stride() const { return (head_dim + 15) / 16 * 16; }
  // On a GPU heads are padded with zeros to 32, 64 or 128.
  std::int64_t gpu_page_bytes() const;
};

struct KvPage {
  // Zeroed; keys and values of the CPU's not if all of them are about to be written.
  explicit KvPage(const KvLayout& layout, bool zeroed = true);

  Tensor keys;    // [G, D, kKvPage]: for a dimension the keys of all tokens side by side
  Tensor values;  // [G, kKvPage, value_stride]
  // [2, H, kKvPage]: the sum of the sequence's log gates up to and with the token, as a float and
  // what that lacks. Differences of such sums keep a float's precision at any length.
  Tensor gates;
  Tensor key_norms;  // [G, kKvPage]: the greatest ‖k‖ up to and with the token

  // On a GPU instead of these: all in one, as src/cuda/kv_pages.cuh lays it out.
  Tensor block;  // [gpu_page_bytes] U8
};

class KvCache {
 public:
  explicit KvCache(const KvLayout& layout) : layout_(layout) {}
  KvCache(const KvCache& other);
  KvCache(KvCache&&) noexcept = default;
  KvCache& operator=(KvCache other) noexcept;
  ~KvCache() = default;

  const KvLayout& layout() const { return layout_; }
  std::int64_t length() const { return length_; }          // tokens read, those dropped included
  std::int64_t first_page() const { return first_page_; }  // the first that is held
  std::int64_t end_page() const { return std::max(first_page_, pages_for(length_)); }
  // The first page for which there is no room yet; pages from end_page() on hold nothing.
  std::int64_t room_page() const { return first_page_ + static_cast<std::int64_t>(pages_.size()); }
  // Page p holds positions [p · kKvPage, (p + 1) · kKvPage).
  const KvPage& page(std::int64_t p) const {
    return *pages_[static_cast<std::size_t>(p - first_page_)];
  }
  KvPage& page(std::int64_t p) { return *pages_[static_cast<std::size_t>(p - first_page_)]; }

  // The first position that the query at `position` sees.
  std::int64_t first_visible(std::int64_t position) const {
    return layout_.window ? std::max<std::int64_t>(0, position + 1 - *layout_.window) : 0;
  }

  // Makes room for `tokens` more; what they hold is for kv_append to write.
  void extend(std::int64_t tokens);
  // The room that extend will need for so many, so that nothing is allocated then.
  void reserve(std::int64_t tokens);
  // Drops the pages that only queries before length() see.
  void drop_unseen();

  // An empty cache becomes one of `length` zeroed tokens, with the pages that one which has read so
  // many holds.
  void grow_to(std::int64_t length);
  // The memory that grow_to takes.
  std::int64_t bytes_at(std::int64_t length) const;

 private:
  static constexpr std::int64_t pages_for(std::int64_t length) {
    return (length + kKvPage - 1) / kKvPage;
  }
  // The page of the last token is kept in any case: running sums continue from it.
  std::int64_t first_page_at(std::int64_t length) const {
    return std::max<std::int64_t>(0, std::min(first_visible(length), length - 1)) / kKvPage;
  }

  // Pages for `tokens` more, of which those that are full then are zeroed or about to be written.
  void make_room(std::int64_t tokens, bool zeroed);

  KvLayout layout_;
  std::int64_t length_ = 0;
  std::int64_t first_page_ = 0;
  std::vector<std::shared_ptr<KvPage>> pages_;
};

}  // namespace deltafox
