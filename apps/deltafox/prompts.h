// The prompts of one run of generate.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "deltafox/tokenizer.h"

namespace deltafox::app {

class PromptOptions {
 public:
  void add(CLI::App& command);

  // The ids of each prompt. `tokenizer` may be null if no prompt is text. Throws Error that names
  // the prompt, or the file and line.
  std::vector<std::vector<std::int32_t>> read(const Tokenizer* tokenizer) const;
  // Whether results are to be JSON lines, as the prompts are.
  bool jsonl() const { return jsonl_; }
  // Whether there is a prompt that needs a tokenizer. (The lines of a file may be ids.)
  bool is_text() const { return !input_ids_ && !jsonl_; }

 private:
  std::optional<std::string> text_;
  std::vector<std::string> texts_;
  std::optional<std::string> file_;
  std::optional<std::string> input_ids_;
  bool jsonl_ = false;
  bool add_special_tokens_ = true;
};

}  // namespace deltafox::app
