#include "io/tokenizer_config.h"

#include <array>
#include <charconv>

#include "core/error.h"
#include "io/utf8.h"
#include "io/vocabulary.h"

namespace deltafox {
namespace {

using nlohmann::json;

constexpr std::array<const char*, 4> kOtherRoles = {"pad_token", "sep_token", "cls_token",
                                                    "mask_token"};
constexpr std::array<const char*, 2> kOtherLists = {"additional_special_tokens",
                                                    "extra_special_tokens"};

// A token's text, written as "x", {"content": "x", ...} or null (empty).
std::string token_content(const json& value, const std::string& file, const std::string& key) {
  if (value.is_null()) return {};
  if (value.is_string()) return value.get<std::string>();
  if (value.is_object() && value.contains("content") && value["content"].is_string()) {
    return value["content"].get<std::string>();
  }
  fail("{}: {} must be a string, null or an object with \"content\"", file, key);
}

void read_role(const json& object, const char* key, const std::string& file,
               std::optional<TokenizerConfig::Role>& role) {
  if (role || !object.contains(key)) return;
  role = {token_content(object[key], file, key), file};
}

void read_roles(const json& object, const std::string& file, TokenizerConfig& config) {
  read_role(object, "bos_token", file, config.bos);
  read_role(object, "eos_token", file, config.eos);
  read_role(object, "unk_token", file, config.unk);
  const auto add = [&](const json& value, const std::string& key) {
    std::string content = token_content(value, file, key);
    if (!content.empty()) config.others.push_back({std::move(content), file});
  };
  for (const char* key : kOtherRoles) {
    if (object.contains(key)) add(object[key], key);
  }
  for (const char* key : kOtherLists) {
    if (!object.contains(key)) continue;
    if (!object[key].is_structured() && !object[key].is_null()) {
      fail("{}: {} must be a list of tokens", file, key);
    }
    for (const json& value : object[key]) add(value, key);
  }
}

json parse_object(std::string_view text, const std::string& file) {
  json object = parse_json(text, file);
  if (!object.is_object()) fail("{}: not a JSON object", file);
  return object;
}

void read_class(const json& object, TokenizerConfig& config) {
  if (!object.contains("tokenizer_class") || object["tokenizer_class"].is_null()) return;
  const json& value = object["tokenizer_class"];
  const std::string name = value.is_string() ? value.get<std::string>() : value.dump();
  if (name == "JSONGPT2Tokenizer") {
    config.escapes_json = true;
  } else if (name != "GPT2Tokenizer" && name != "GPT2TokenizerFast" &&
             name != "PreTrainedTokenizerFast") {
    fail(
        "{}: tokenizer_class is {}, supported are GPT2Tokenizer, GPT2TokenizerFast, "
        "PreTrainedTokenizerFast and JSONGPT2Tokenizer",
        config.file, quote_name(name));
  }
}

void read_added_tokens(const json& object, TokenizerConfig& config) {
  if (!object.contains("added_tokens_decoder")) return;
  const json& decoder = object["added_tokens_decoder"];
  if (!decoder.is_object()) fail("{}: added_tokens_decoder must be an object", config.file);
  for (const auto& [key, entry] : decoder.items()) {
    std::int64_t id = 0;
    const auto [stop, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || stop != key.data() + key.size()) {
      fail("{}: added_tokens_decoder: {} is not a token id", config.file, quote_name(key));
    }
    config.added_tokens.push_back(parse_added_token(entry, id, config.file));
  }
}

}  // namespace

std::string file_in(const std::string& directory, const char* name) {
  return directory + "/" + name;
}

json parse_json(std::string_view text, const std::string& file) {
  try {
    return json::parse(text);
  } catch (const json::exception& error) {
    // The message quotes the file, up to the byte at fault.
    constexpr std::size_t kShown = 200;
    fail("{}: {}", file, utf8::replace_invalid(std::string_view(error.what()).substr(0, kShown)));
  }
}

std::optional<bool> optional_bool(const json& object, const char* key, const std::string& file) {
  if (!object.contains(key) || object[key].is_null()) return std::nullopt;
  if (!object[key].is_boolean()) fail("{}: {} must be true or false", file, key);
  return object[key].get<bool>();
}

TokenizerConfig::AddedToken parse_added_token(const json& entry, std::int64_t id,
                                              const std::string& file) {
  if (!entry.is_object() || !entry.contains("content") || !entry["content"].is_string()) {
    fail("{}: added token {} has no \"content\"", file, id);
  }
  std::string content = entry["content"].get<std::string>();
  for (const char* key : {"single_word", "lstrip", "rstrip"}) {
    if (optional_bool(entry, key, file).value_or(false)) {
      fail("{}: added token {}: {} is not supported", file, quote_name(content), key);
    }
  }
  return {std::move(content), id, optional_bool(entry, "special", file).value_or(false)};
}

TokenizerConfig parse_tokenizer_config(const TokenizerFiles& files, const std::string& directory) {
  TokenizerConfig config;
  config.file = file_in(directory, "tokenizer_config.json");
  if (files.tokenizer_config) {
    const json object = parse_object(*files.tokenizer_config, config.file);
    read_class(object, config);
    config.add_bos_token = optional_bool(object, "add_bos_token", config.file);
    config.add_prefix_space = optional_bool(object, "add_prefix_space", config.file);
    read_roles(object, config.file, config);
    read_added_tokens(object, config);
  }
  if (files.special_tokens_map) {
    const std::string file = file_in(directory, "special_tokens_map.json");
    read_roles(parse_object(*files.special_tokens_map, file), file, config);
  }
  return config;
}

}  // namespace deltafox
