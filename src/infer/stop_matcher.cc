#include "infer/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace deltafox::infer {

StopMatcher::StopMatcher(std::vector<std::string> stop_strings, bool keep, std::string_view before)
    : stop_strings_(std::move(stop_strings)), keep_(keep) {
  for (const std::string& stop : stop_strings_) longest_ = std::max(longest_, stop.size());
  if (longest_ > 0) tail_ = before.substr(before.size() - std::min(before.size(), longest_ - 1));
  shown_ = tail_.size();
}

bool StopMatcher::find(std::size_t old_size, std::size_t& begin) {
  bool any = false;
  for (const std::string& stop : stop_strings_) {
    // A match that ends in the text of earlier pieces was none of this piece's making.
    const std::size_t first = old_size - std::min(old_size, stop.size() - 1);
    const std::size_t at = tail_.find(stop, first);
    if (at == std::string::npos) continue;
    if (any && (at > begin || (at == begin && stop.size() <= found_.size()))) continue;
    any = true;
    begin = at;
    found_ = stop;
  }
  return any;
}

std::size_t StopMatcher::held_size() const {
  const std::string_view text = tail_;
  for (std::size_t size = std::min(longest_ - 1, text.size()); size > 0; --size) {
    const std::string_view end = text.substr(text.size() - size);
    for (const std::string& stop : stop_strings_) {
      if (stop.size() > size && std::string_view(stop).starts_with(end)) return size;
    }
  }
  return 0;
}

std::string StopMatcher::push(std::string_view piece) {
  if (stop_strings_.empty()) return std::string(piece);
  const std::size_t old_size = tail_.size();
  tail_ += piece;
  std::size_t begin = 0;
  const bool matched = find(old_size, begin);
  const std::size_t end = !matched ? tail_.size() - held_size() : keep_ ? tail_.size() : begin;
  std::string text;
  if (end > shown_) text = tail_.substr(shown_, end - shown_);
  shown_ = matched ? tail_.size() : std::max(shown_, end);

  const std::size_t drop = tail_.size() - std::min(tail_.size(), longest_ - 1);
  const std::size_t safe = std::min(drop, shown_);
  tail_.erase(0, safe);
  shown_ -= safe;
  return text;
}

std::string StopMatcher::finish() {
  std::string text = tail_.substr(shown_);
  shown_ = tail_.size();
  return text;
}

}  // namespace deltafox::infer
