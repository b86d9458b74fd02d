// Finds tokens that are written out in a text and must not be cut by byte-pair encoding.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace deltafox {

class SpecialTokens {
 public:
  // Bounds the work at each byte of a text.
  static constexpr std::size_t kMaxLength = 1024;

  struct Match {
    std::size_t begin;
    std::size_t end;
    std::int32_t token;
  };

  // `content` has 1 to kMaxLength bytes.
  void add(std::string_view content, std::int32_t token);

  // The leftmost occurrence at or after `from`, and the longest there.
  std::optional<Match> find(std::string_view text, std::size_t from) const;

 private:
  static constexpr std::int32_t kNone = -1;

  // A trie: node and byte to node; the root is 0.
  std::unordered_map<std::uint64_t, std::uint64_t> edges_;
  std::vector<std::int32_t> token_at_{kNone};
  std::array<bool, 256> begins_{};
};

}  // namespace deltafox
