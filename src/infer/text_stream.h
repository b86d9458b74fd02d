// The text of one sequence's new tokens as they come: decoded, and with stop strings looked for.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "deltafox/tokenizer.h"
#include "infer/stop_matcher.h"

namespace deltafox::infer {

class TextStream {
 public:
  TextStream(const Tokenizer& tokenizer, bool skip_special_tokens, StopMatcher matcher)
      : decoder_(tokenizer, skip_special_tokens), matcher_(std::move(matcher)) {}

  // Text that became certain with this token and cannot belong to a stop string to come.
  std::string push(std::int32_t id) { return matcher_.push(decoder_.push(id)); }

  // The rest, once the last token was pushed. After a stop string that is cut off, there is none.
  std::string finish() { return matcher_.finish() + (cut() ? std::string() : decoder_.finish()); }

  const std::string& stop_string() const { return matcher_.found(); }

 private:
  bool cut() const { return !matcher_.found().empty() && !matcher_.keeps(); }

  StreamDecoder decoder_;
  StopMatcher matcher_;
};

}  // namespace deltafox::infer
