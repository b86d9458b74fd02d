// A small tokenizer for fuzzing: all 256 bytes, some merges, two special tokens.
#pragma once

#include <fmt/format.h>

#include <string>
#include <vector>

#include "deltafox/tokenizer.h"
#include "io/utf8.h"

namespace deltafox {

inline Tokenizer byte_tokenizer(bool escapes_json) {
  // GPT-2's alphabet: the character of each byte.
  std::vector<std::string> names(256);
  char32_t other = 0x100;
  for (char32_t b = 0; b < 256; ++b) {
    const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b != 0xAD);
    utf8::append(printable ? b : other++, names[b]);
  }
  TokenizerFiles files;
  files.merges = "#version: 0.2\n";
  const auto merge = [&](const std::string& left, const std::string& right) {
    *files.merges += left + " " + right + "\n";
    names.push_back(left + right);
  };
  merge("\\", "u");
  merge("\\u", "0");
  merge("0", "0");
  merge("\\u0", "00");
  merge("\\", "N");
  merge("\\N", "{");
  merge("a", "a");
  merge("aa", "aa");
  merge(names[0xC3], names[0xA9]);
  merge(names[0xE4], names[0xB8]);
  merge(names[0xF0], names[0x9F]);
  merge("\\", "\\");
  std::string vocab = "{";
  for (std::size_t id = 0; id < names.size(); ++id) {
    std::string escaped;
    for (const char c : names[id])
      escaped += c == '"' || c == '\\' ? std::string{'\\', c} : std::string{c};
    vocab += fmt::format("\"{}\": {}, ", escaped, id);
  }
  files.vocab = vocab + fmt::format("\"<|endoftext|>\": {}}}", names.size());
  files.tokenizer_config = fmt::format(
      R"({{"tokenizer_class": "{}", "added_tokens_decoder": {{"{}": {{"content": "<é>", "special": true}}}}}})",
      escapes_json ? "JSONGPT2Tokenizer" : "GPT2Tokenizer", names.size() + 1);
  return Tokenizer::from_files(files);
}

}  // namespace deltafox
