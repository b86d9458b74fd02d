// Decodes fuzzed ids, whole and as a stream: always valid UTF-8, and the same text wherever the
// header of StreamDecoder promises it.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "byte_tokenizer.h"
#include "deltafox/tokenizer.h"
#include "io/utf8.h"

namespace {

using deltafox::StreamDecoder;
using deltafox::Tokenizer;

void require(bool condition) {
  if (!condition) std::abort();
}

bool is_utf8(std::string_view text) {
  return deltafox::utf8::first_invalid(text) == std::string_view::npos;
}

std::string stream(const Tokenizer& tokenizer, const std::vector<std::int32_t>& ids, bool skip) {
  StreamDecoder decoder(tokenizer, skip);
  std::string text;
  for (const std::int32_t id : ids) {
    const std::string piece = decoder.push(id);
    require(is_utf8(piece));
    text += piece;
  }
  const std::string rest = decoder.finish();
  require(is_utf8(rest));
  return text + rest;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Tokenizer plain = deltafox::byte_tokenizer(false);
  static const Tokenizer escaping = deltafox::byte_tokenizer(true);
  std::vector<std::int32_t> ids;
  // A byte is its token; 0xFF and a byte reach the tokens above.
  for (std::size_t i = 0; i < size; ++i) {
    const bool high = data[i] == 0xFF && i + 1 < size;
    ids.push_back(high ? (256 + data[++i] % (plain.vocab_size() - 256)) : data[i]);
  }
  for (const bool skip : {false, true}) {
    const std::string raw = plain.decode(ids, skip);
    require(is_utf8(raw));
    require(stream(plain, ids, skip) == raw);
    const std::string whole = escaping.decode(ids, skip);
    require(is_utf8(whole));
    const std::string streamed = stream(escaping, ids, skip);
    const bool ascii = std::all_of(raw.begin(), raw.end(), [](char c) { return c >= 0; });
    if (ascii && raw.find("\\/") == std::string::npos) require(streamed == whole);
  }
  return 0;
}
