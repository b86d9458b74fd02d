// Encodes fuzzed text: an Error if it is not UTF-8, and otherwise ids that decode to it.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "byte_tokenizer.h"
#include "deltafox/error.h"
#include "deltafox/tokenizer.h"
#include "io/utf8.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const deltafox::Tokenizer tokenizers[] = {deltafox::byte_tokenizer(false),
                                                   deltafox::byte_tokenizer(true)};
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const bool valid = deltafox::utf8::first_invalid(text) == std::string_view::npos;
  for (const deltafox::Tokenizer& tokenizer : tokenizers) {
    try {
      if (tokenizer.decode(tokenizer.encode(text)) != text) std::abort();
      if (!valid) std::abort();
    } catch (const deltafox::Error&) {
      if (valid) std::abort();
    }
  }
  return 0;
}
