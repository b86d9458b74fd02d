#include "prompts.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <utility>

#include "common.h"
#include "core/error.h"
#include "io/json.h"

namespace deltafox::app {
namespace {

class PromptReader {
 public:
  PromptReader(const Tokenizer* tokenizer, bool add_special_tokens)
      : tokenizer_(tokenizer), add_special_tokens_(add_special_tokens) {}

  void add_text(const std::string& text, const std::string& source) {
    if (text.empty()) fail("{}: the prompt is empty", source);
    if (tokenizer_ == nullptr) fail("{}: a text needs a tokenizer", source);
    std::vector<std::int32_t> ids;
    try {
      ids = tokenizer_->encode(text, add_special_tokens_);
    } catch (const Error& error) {
      fail("{}: {}", source, error.what());
    }
    add_ids(std::move(ids), source);
  }

  void add_ids(std::vector<std::int32_t> ids, const std::string& source) {
    if (ids.empty()) fail("{}: the prompt is empty", source);
    prompts_.push_back(std::move(ids));
  }

  // Each line a text, or an object with "prompt" or "input_ids".
  void add_lines(const std::string& lines, const std::string& file) {
    std::size_t number = 0;
    for (std::size_t begin = 0; begin < lines.size();) {
      const std::size_t end = std::min(lines.find('\n', begin), lines.size());
      const std::string line = lines.substr(begin, end - begin);
      begin = end + 1;
      ++number;
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      add_line(line, fmt::format("{}: line {}", file, number));
    }
    if (prompts_.empty()) fail("{}: holds no prompt", file);
  }

  std::vector<std::vector<std::int32_t>> take() { return std::move(prompts_); }

 private:
  void add_line(const std::string& line, const std::string& source) {
    const nlohmann::json value = io::parse_json(line, source, io::JsonDialect::kStrict);
    if (value.is_string()) return add_text(value.get<std::string>(), source);
    if (value.is_object() && value.contains("prompt") && value["prompt"].is_string()) {
      return add_text(value["prompt"].get<std::string>(), source);
    }
    if (value.is_object() && value.contains("input_ids")) {
      std::vector<std::int32_t> ids;
      const auto object = io::JsonObject::parse(line, source);
      for (const std::int64_t id : object.integers("input_ids", 0, INT32_MAX)) {
        ids.push_back(static_cast<std::int32_t>(id));
      }
      return add_ids(std::move(ids), source);
    }
    fail("{}: must be a string, or an object with \"prompt\" or \"input_ids\"", source);
  }

  const Tokenizer* tokenizer_;
  bool add_special_tokens_;
  std::vector<std::vector<std::int32_t>> prompts_;
};

}  // namespace

void PromptOptions::add(CLI::App& command) {
  command.add_option("PROMPT", text_, "The prompt")->type_name("");
  command.add_option("-p,--prompt", texts_, "A prompt; may be given several times")
      ->type_name("TEXT")
      ->allow_extra_args(false);
  command
      .add_option("--prompt-file", file_,
                  "Read the prompt from a file, less one newline at its end; -: stdin")
      ->type_name("FILE");
  command.add_flag("--jsonl", jsonl_,
                   "The file holds one prompt a line: a JSON string, or an object with \"prompt\" "
                   "or \"input_ids\". Prints one JSON object a line for each sequence");
  command.add_option("--input-ids", input_ids_, "The prompt as token ids, as in 464,3139,286")
      ->type_name("IDS");
  command.add_flag("--add-special-tokens,!--no-add-special-tokens", add_special_tokens_,
                   "Put the BOS token in front where the tokenizer's configuration says so "
                   "(default)");
}

std::vector<std::vector<std::int32_t>> PromptOptions::read(const Tokenizer* tokenizer) const {
  const int sources = static_cast<int>(text_ || !texts_.empty()) +
                      static_cast<int>(file_.has_value()) +
                      static_cast<int>(input_ids_.has_value());
  if (sources != 1) fail("give one of PROMPT, --prompt, --prompt-file and --input-ids");
  PromptReader reader(tokenizer, add_special_tokens_);
  if (text_) reader.add_text(*text_, "prompt");
  for (const std::string& text : texts_) reader.add_text(text, "prompt");
  if (input_ids_) reader.add_ids(parse_ids(*input_ids_, "--input-ids"), "--input-ids");
  if (file_) {
    std::string text = read_input(*file_);
    const std::string source = *file_ == "-" ? "stdin" : *file_;
    if (jsonl_) {
      reader.add_lines(text, source);
    } else {
      if (text.ends_with('\n')) text.pop_back();
      reader.add_text(text, source);
    }
  }
  return reader.take();
}

}  // namespace deltafox::app
