// Tokenizers and texts for the tokenizer tests.
#pragma once

#include <cstdint>
#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "deltafox/tokenizer.h"
#include "io/utf8.h"

namespace deltafox {

inline std::string read_test_file(const std::string& name) {
  std::ifstream in(std::string(DELTAFOX_TEST_DATA) + "/" + name, std::ios::binary);
  if (!in) throw std::runtime_error("cannot open " + name);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline TokenizerFiles gpt2_files() {
  TokenizerFiles files;
  files.vocab = read_test_file("gpt2/vocab.json");
  files.merges = read_test_file("gpt2/merges.txt");
  return files;
}

inline Tokenizer gpt2_tokenizer() {
  static const Tokenizer tokenizer = Tokenizer::from_files(gpt2_files());
  return tokenizer;
}

inline Tokenizer json_gpt2_tokenizer() {
  static const Tokenizer tokenizer = [] {
    TokenizerFiles files = gpt2_files();
    files.tokenizer_config = R"({"tokenizer_class": "JSONGPT2Tokenizer"})";
    return Tokenizer::from_files(files);
  }();
  return tokenizer;
}

inline bool is_utf8(std::string_view text) {
  return utf8::first_invalid(text) == std::string_view::npos;
}

// Characters of all kinds: ASCII, spaces, escapes, Latin, CJK, combining, astral.
inline std::string random_text(std::mt19937& random, std::size_t max_characters) {
  const auto below = [&](std::uint32_t n) { return static_cast<std::uint32_t>(random() % n); };
  std::string text;
  for (std::size_t n = below(static_cast<std::uint32_t>(max_characters) + 1); n > 0; --n) {
    char32_t c = 0;
    switch (below(8)) {
      case 0:
        c = below(0x80);
        break;
      case 1:
        c = U" \t\n\r\\\"'/u{}<|>"[below(15)];
        break;
      case 2:
        c = 0x80 + below(0x780);
        break;
      case 3:
        c = 0x3000 + below(0x6000);
        break;
      case 4:
        c = 0x1F300 + below(0x400);
        break;
      case 5:
        c = below(0x110000);
        break;
      default:
        c = U'a' + below(26);
        break;
    }
    if (c < 0xD800 || c >= 0xE000) utf8::append(c, text);
  }
  return text;
}

}  // namespace deltafox
