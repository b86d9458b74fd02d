// What tokenizer_config.json and special_tokens_map.json say.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "deltafox/tokenizer.h"

namespace deltafox {

struct TokenizerConfig {
  // A token that a file gives a role.
  struct Role {
    std::string content;
    std::string file;
  };
  struct AddedToken {
    std::string content;
    std::int64_t id;
    bool special;
  };

  bool escapes_json = false;
  std::optional<bool> add_bos_token;
  std::optional<bool> add_prefix_space;
  // Absent: the files say nothing. Present but empty content: there is none.
  std::optional<Role> bos;
  std::optional<Role> eos;
  std::optional<Role> unk;
  // Padding and the like: special, but without a meaning here.
  std::vector<Role> others;
  std::vector<AddedToken> added_tokens;
  std::string file;  // tokenizer_config.json as messages name it
};

// "directory/name", as messages name a file.
std::string file_in(const std::string& directory, const char* name);

// Parses a (small) JSON text; throws Error that names the file.
nlohmann::json parse_json(std::string_view text, const std::string& file);

// An entry of added_tokens or added_tokens_decoder. Refuses the options that change how it is
// found.
TokenizerConfig::AddedToken parse_added_token(const nlohmann::json& entry, std::int64_t id,
                                              const std::string& file);

// object[key] as a boolean, or nothing if it is absent or null.
std::optional<bool> optional_bool(const nlohmann::json& object, const char* key,
                                  const std::string& file);

TokenizerConfig parse_tokenizer_config(const TokenizerFiles& files, const std::string& directory);

}  // namespace deltafox
