// UTF-8: validity, repair and the code points of text.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace deltafox::utf8 {

inline constexpr char32_t kReplacement = 0xFFFD;

// Byte offset of the first sequence that is not UTF-8 (Unicode, table 3-7), or npos.
std::size_t first_invalid(std::string_view text);

// Appends the UTF-8 of a code point, which is not a surrogate.
void append(char32_t code_point, std::string& out);

// The code point at `at` of valid UTF-8; advances `at` behind it.
char32_t next(std::string_view text, std::size_t& at);

// Length of an incomplete character at the end of `text`: a prefix of a valid sequence that more
// bytes could complete, 0 to 3 bytes.
std::size_t incomplete_tail(std::string_view text);

// Valid UTF-8: each maximal part of an invalid sequence becomes one U+FFFD, as in Python's
// bytes.decode(errors="replace") and as the Unicode standard recommends.
std::string replace_invalid(std::string_view text);

}  // namespace deltafox::utf8
