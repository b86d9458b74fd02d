#include "io/tokenizer_json.h"

#include <nlohmann/json.hpp>
#include <vector>

#include "core/error.h"
#include "io/json_reader.h"
#include "io/tokenizer_config.h"

namespace deltafox {
namespace {

using nlohmann::json;

// value["type"], or "null" and the like for anything that has none.
std::string type_of(const json& value) {
  if (value.is_object() && value.contains("type") && value["type"].is_string()) {
    return value["type"].get<std::string>();
  }
  return value.is_null() ? "null" : "of no known type";
}

class TokenizerJsonReader {
 public:
  TokenizerJsonReader(std::string_view text, const std::string& file, VocabularyBuilder& builder)
      : reader_(text, file), file_(file), builder_(builder) {}

  TokenizerJson run() {
    bool has_model = false;
    std::string key;
    reader_.enter('{');
    while (reader_.next_member(key)) {
      if (key == "model") {
        if (has_model) reader_.fail_here("a second model");
        has_model = true;
        read_model();
      } else {
        read_setting(key);
      }
    }
    reader_.finish();
    if (!has_model) fail("{}: there is no model", file_);
    if (!has_pre_tokenizer_) refuse("pre_tokenizer", "null");
    if (!has_decoder_) refuse("decoder", "null");
    for (const TokenizerConfig::AddedToken& token : added_tokens_) {
      builder_.add_special(token.content, token.id, token.special, file_);
    }
    return std::move(result_);
  }

 private:
  [[noreturn]] void refuse(std::string_view key, std::string_view found) const {
    fail("{}: {} is {}; only byte-level BPE as in GPT-2 is supported", file_, key, found);
  }

  json parse_value() { return parse_json(reader_.skip_value(), file_); }

  void read_setting(const std::string& key) {
    if (key == "added_tokens") {
      for (const json& entry : parse_value()) {
        if (!entry.is_object() || !entry.contains("id") || !entry["id"].is_number_integer()) {
          fail("{}: added_tokens: an entry has no integer \"id\"", file_);
        }
        added_tokens_.push_back(parse_added_token(entry, entry["id"].get<std::int64_t>(), file_));
      }
    } else if (key == "normalizer") {
      const json value = parse_value();
      if (!value.is_null()) refuse(key, type_of(value));
    } else if (key == "pre_tokenizer") {
      has_pre_tokenizer_ = true;
      const json value = parse_value();
      if (type_of(value) != "ByteLevel") refuse(key, type_of(value));
      result_.add_prefix_space = optional_bool(value, "add_prefix_space", file_).value_or(true);
      if (!optional_bool(value, "use_regex", file_).value_or(true)) {
        refuse(key, "ByteLevel without use_regex");
      }
    } else if (key == "decoder") {
      has_decoder_ = true;
      const json value = parse_value();
      if (type_of(value) != "ByteLevel") refuse(key, type_of(value));
    } else if (key == "post_processor") {
      read_post_processor(parse_value());
    } else {
      reader_.skip_value();
    }
  }

  // ByteLevel only moves offsets. A template may put one special token in front of a single text.
  void read_post_processor(const json& value) {
    const std::string type = type_of(value);
    if (value.is_null() || type == "ByteLevel") return;
    if (type == "Sequence" && value.contains("processors") && value["processors"].is_array()) {
      for (const json& processor : value["processors"]) {
        if (type_of(processor) == "Sequence") refuse("post_processor", "a Sequence of Sequences");
        read_post_processor(processor);
      }
      return;
    }
    if (type != "TemplateProcessing") refuse("post_processor", type);
    std::vector<std::string> before;
    std::size_t texts = 0;
    const json parts = value.contains("single") ? value["single"] : json();
    for (const json& part : parts) {
      if (part.is_object() && part.contains("Sequence")) {
        ++texts;
      } else if (texts == 0 && part.is_object() && part.contains("SpecialToken") &&
                 part["SpecialToken"].is_object() && part["SpecialToken"].contains("id") &&
                 part["SpecialToken"]["id"].is_string()) {
        before.push_back(part["SpecialToken"]["id"].get<std::string>());
      } else {
        refuse("post_processor", "a template that does more than prepend a token");
      }
    }
    if (texts != 1 || before.size() > 1) {
      refuse("post_processor", "a template that does more than prepend a token");
    }
    if (!before.empty()) result_.prepends = before[0];
  }

  void read_model() {
    std::string key;
    bool has_vocab = false;
    bool has_merges = false;
    reader_.enter('{');
    while (reader_.next_member(key)) {
      if (key == "vocab") {
        if (reader_.peek() != '{') reader_.fail_here("model.vocab must be an object (type BPE)");
        has_vocab = true;
        read_vocab();
      } else if (key == "merges") {
        has_merges = true;
        read_merges();
      } else {
        read_model_setting(key);
      }
    }
    if (!has_vocab) fail("{}: model has no vocab", file_);
    if (!has_merges) fail("{}: model has no merges", file_);
  }

  void read_model_setting(const std::string& key) {
    const json value = parse_value();
    const std::string name = value.is_string() ? value.get<std::string>() : "";
    const bool off = value.is_null() || value == false || (value.is_string() && name.empty()) ||
                     (value.is_number() && value.get<double>() == 0);
    if (key == "type") {
      if (name != "BPE" && !value.is_null()) {
        refuse("model.type", value.is_string() ? name : value.dump());
      }
    } else if (key == "unk_token") {
      if (!name.empty()) result_.unk = name;
    } else if (key == "dropout" || key == "continuing_subword_prefix" ||
               key == "end_of_word_suffix" || key == "byte_fallback" || key == "ignore_merges") {
      if (!off) fail("{}: model.{} is not supported", file_, key);
    }
  }

  void read_vocab() {
    std::string token;
    reader_.enter('{');
    while (reader_.next_member(token)) builder_.add_token(token, reader_.read_integer());
  }

  // "left right" or ["left", "right"]
  void read_merges() {
    std::string left;
    std::string right;
    std::uint32_t number = 0;
    reader_.enter('[');
    while (reader_.next_element()) {
      ++number;
      bool pair = false;
      if (reader_.peek() == '[') {
        reader_.enter('[');
        pair = reader_.next_element();
        if (pair) reader_.read_string(left);
        pair = pair && reader_.next_element();
        if (pair) reader_.read_string(right);
        pair = pair && !reader_.next_element();
      } else {
        reader_.read_string(left);
        const std::size_t space = left.find(' ');
        pair = space != std::string::npos && left.find(' ', space + 1) == std::string::npos;
        if (pair) {
          right = left.substr(space + 1);
          left.resize(space);
        }
      }
      if (!pair || left.empty() || right.empty()) {
        fail("{}: merge {}: expected two tokens", file_, number);
      }
      builder_.add_merge(left, right, number);
    }
  }

  JsonReader reader_;
  const std::string& file_;
  VocabularyBuilder& builder_;
  TokenizerJson result_;
  std::vector<TokenizerConfig::AddedToken> added_tokens_;
  bool has_pre_tokenizer_ = false;
  bool has_decoder_ = false;
};

}  // namespace

TokenizerJson read_tokenizer_json(std::string_view text, const std::string& file,
                                  VocabularyBuilder& builder) {
  return TokenizerJsonReader(text, file, builder).run();
}

}  // namespace deltafox
