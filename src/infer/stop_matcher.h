// Finding stop strings in text that comes in pieces, and holding back what may become one.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace deltafox::infer {

// A stop string matches when it ends inside a pushed piece; it may begin in an earlier one or in
// the text before the first. Of several matches the one that begins first counts, then the longest.
class StopMatcher {
 public:
  // `keep`: whether a matched stop string, and the rest of its last piece, belongs to the text.
  // `before`: the text that precedes the first piece.
  StopMatcher(std::vector<std::string> stop_strings, bool keep, std::string_view before);

  // Text that may be shown now: all but the longest tail that begins a stop string.
  std::string push(std::string_view piece);
  // What is still held back, at the end of a text in which no stop string was found.
  std::string finish();

  // The stop string found, or empty. Nothing may be pushed after it.
  const std::string& found() const { return found_; }
  bool keeps() const { return keep_; }

 private:
  bool find(std::size_t old_size, std::size_t& begin);
  std::size_t held_size() const;

  std::vector<std::string> stop_strings_;
  std::size_t longest_ = 0;  // bytes of the longest stop string
  bool keep_;
  std::string found_;
  std::string tail_;       // the end of the text so far, as far back as a match can begin
  std::size_t shown_ = 0;  // bytes of tail_ that were shown or precede the first piece
};

}  // namespace deltafox::infer
