// GPT-2's pre-tokenization, by hand: the leftmost match, in this order, of
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// \p{L} and \p{N} are the Unicode general categories L* and N* as utf8proc knows them, \s is the
// Unicode property White_Space (so U+0085 is a space, U+001C..U+001F, U+180E and U+200B are not).
// utf8proc 2.8 knows Unicode 14: what was assigned later counts as neither letter nor number.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace deltafox {

enum class CharClass : std::uint8_t { kOther, kLetter, kNumber, kSpace };

class Pretokenizer {
 public:
  // The one instance; its table is built at the first call.
  static const Pretokenizer& instance();

  // The piece that starts at `at` < text.size(). `text` is valid UTF-8.
  std::string_view piece(std::string_view text, std::size_t at) const;

  CharClass class_of(char32_t code_point) const;

 private:
  Pretokenizer();

  struct Char {
    CharClass char_class;
    std::uint8_t length;  // bytes
  };
  Char char_at(const char* p) const;
  const char* run_end(const char* p, const char* end, CharClass char_class) const;
  const char* space_end(const char* p, const char* end) const;

  // Letters, digits and spaces are mostly here; the few code points above are looked up one by one.
  std::array<CharClass, 0x10000> basic_plane_;
};

}  // namespace deltafox
