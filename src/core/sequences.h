// The packing of a ragged batch.
#pragma once

#include <cstdint>
#include <span>

namespace deltafox {

// B sequences packed one after the other: sequence b holds rows [begin(b), end(b)) of the T rows.
class Sequences {
 public:
  explicit Sequences(std::span<const std::int64_t> cu_seqlens) : cu_seqlens_(cu_seqlens) {}

  std::int64_t count() const { return static_cast<std::int64_t>(cu_seqlens_.size()) - 1; }
  std::int64_t tokens() const { return cu_seqlens_.back(); }
  std::int64_t begin(std::int64_t b) const { return cu_seqlens_[static_cast<std::size_t>(b)]; }
  std::int64_t end(std::int64_t b) const { return cu_seqlens_[static_cast<std::size_t>(b) + 1]; }
  std::int64_t length(std::int64_t b) const { return end(b) - begin(b); }
  std::span<const std::int64_t> cu_seqlens() const { return cu_seqlens_; }

 private:
  std::span<const std::int64_t> cu_seqlens_;  // [B+1]
};

}  // namespace deltafox
