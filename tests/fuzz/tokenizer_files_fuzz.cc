// Loads tokenizers from fuzzed files: an Error or a tokenizer that encodes and decodes.
//
// The first byte chooses what the rest is: '0' tokenizer_config.json, '1' special_tokens_map.json,
// '2' vocab.json, '3' merges.txt, '4' tokenizer.json, '5' vocab.json, NUL, merges.txt.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "deltafox/error.h"
#include "deltafox/tokenizer.h"
#include "io/utf8.h"

namespace {

using deltafox::Tokenizer;
using deltafox::TokenizerFiles;

TokenizerFiles files_from(char kind, std::string content) {
  TokenizerFiles files;
  files.vocab = R"({"a": 0, "b": 1, "\u0120": 2, "ab": 3, "\u0120ab": 4, "<|endoftext|>": 5})";
  files.merges = "#version: 0.2\na b\n\u0120 ab\n";
  switch (kind) {
    case '0':
      files.tokenizer_config = std::move(content);
      break;
    case '1':
      files.special_tokens_map = std::move(content);
      break;
    case '2':
      files.vocab = std::move(content);
      break;
    case '3':
      files.merges = std::move(content);
      break;
    case '5': {
      const std::size_t end = content.find('\0');
      files.vocab = content.substr(0, end);
      files.merges = end == std::string::npos ? "" : content.substr(end + 1);
      break;
    }
    default:
      files.vocab.reset();
      files.tokenizer = std::move(content);
  }
  return files;
}

void use(const Tokenizer& tokenizer) {
  try {
    const std::vector<std::int32_t> ids = tokenizer.encode("ab abba<|endoftext|>\n");
    const std::string text = tokenizer.decode(ids);
    if (deltafox::utf8::first_invalid(text) != std::string::npos) std::abort();
  } catch (const deltafox::Error&) {  // a byte that the vocabulary lacks
  }
  for (std::int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    try {
      tokenizer.decode(std::vector<std::int32_t>{id});
    } catch (const deltafox::Error&) {  // an unused id
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const auto* const text = reinterpret_cast<const char*>(data);
  try {
    use(Tokenizer::from_files(files_from(text[0], std::string(text + 1, size - 1))));
  } catch (const deltafox::Error& error) {
    // One line, and valid UTF-8, since people read it.
    const std::string message = error.what();
    if (message.find('\n') != std::string::npos) std::abort();
    if (deltafox::utf8::first_invalid(message) != std::string::npos) std::abort();
  }
  return 0;
}
