#include "io/special_tokens.h"

namespace deltafox {
namespace {

std::uint64_t edge(std::uint64_t node, char byte) {
  return node << 8 | static_cast<unsigned char>(byte);
}

}  // namespace

void SpecialTokens::add(std::string_view content, std::int32_t token) {
  begins_[static_cast<unsigned char>(content[0])] = true;
  std::uint64_t node = 0;
  for (const char byte : content) {
    const auto [found, inserted] = edges_.try_emplace(edge(node, byte), token_at_.size());
    if (inserted) token_at_.push_back(kNone);
    node = found->second;
  }
  token_at_[node] = token;
}

std::optional<SpecialTokens::Match> SpecialTokens::find(std::string_view text,
                                                        std::size_t from) const {
  for (std::size_t begin = from; begin < text.size(); ++begin) {
    if (!begins_[static_cast<unsigned char>(text[begin])]) continue;
    Match match{begin, begin, kNone};
    std::uint64_t node = 0;
    for (std::size_t at = begin; at < text.size(); ++at) {
      const auto found = edges_.find(edge(node, text[at]));
      if (found == edges_.end()) break;
      node = found->second;
      if (token_at_[node] != kNone) match = {begin, at + 1, token_at_[node]};
    }
    if (match.token != kNone) return match;
  }
  return std::nullopt;
}

}  // namespace deltafox
