#include "io/pretokenizer.h"

#include <utf8proc.h>

namespace deltafox {
namespace {

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

CharClass classify(char32_t c) {
  if (is_white_space(c)) return CharClass::kSpace;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      return CharClass::kLetter;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return CharClass::kNumber;
    default:
      return CharClass::kOther;
  }
}

// Length of 's 't 're 've 'm 'll 'd at an apostrophe, or 0.
std::size_t contraction_length(const char* p, const char* end) {
  if (end - p < 2) return 0;
  if (p[1] == 's' || p[1] == 't' || p[1] == 'm' || p[1] == 'd') return 2;
  if (end - p < 3) return 0;
  const bool known =
      (p[1] == 'r' && p[2] == 'e') || (p[1] == 'v' && p[2] == 'e') || (p[1] == 'l' && p[2] == 'l');
  return known ? 3 : 0;
}

}  // namespace

Pretokenizer::Pretokenizer() {
  for (char32_t c = 0; c < basic_plane_.size(); ++c) basic_plane_[c] = classify(c);
}

const Pretokenizer& Pretokenizer::instance() {
  static const Pretokenizer pretokenizer;
  return pretokenizer;
}

CharClass Pretokenizer::class_of(char32_t code_point) const {
  return code_point < basic_plane_.size() ? basic_plane_[code_point] : classify(code_point);
}

inline Pretokenizer::Char Pretokenizer::char_at(const char* p) const {
  const auto byte = [p](int i) -> char32_t { return static_cast<unsigned char>(p[i]); };
  const char32_t lead = byte(0);
  if (lead < 0x80) return {basic_plane_[lead], 1};
  if (lead < 0xE0) return {basic_plane_[(lead & 0x1F) << 6 | (byte(1) & 0x3F)], 2};
  const char32_t three = (lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
  if (lead < 0xF0) return {basic_plane_[three], 3};
  return {classify((three & 0x7FFF) << 6 | (byte(3) & 0x3F)), 4};
}

inline const char* Pretokenizer::run_end(const char* p, const char* end,
                                         CharClass char_class) const {
  while (p < end) {
    const Char c = char_at(p);
    if (c.char_class != char_class) break;
    p += c.length;
  }
  return p;
}

// A run of white space leaves its last character to what follows, unless it is the only one.
const char* Pretokenizer::space_end(const char* p, const char* end) const {
  const char* const begin = p;
  const char* last = p;
  while (p < end) {
    const Char c = char_at(p);
    if (c.char_class != CharClass::kSpace) break;
    last = p;
    p += c.length;
  }
  return p == end || last == begin ? p : last;
}

std::string_view Pretokenizer::piece(std::string_view text, std::size_t at) const {
  const char* const begin = text.data() + at;
  const char* const end = text.data() + text.size();
  if (*begin == '\'') {
    if (const std::size_t length = contraction_length(begin, end)) return {begin, length};
  }
  const char* p = begin;
  if (*p == ' ' && end - p > 1) ++p;
  const CharClass char_class = char_at(p).char_class;
  const char* const stop =
      char_class == CharClass::kSpace ? space_end(begin, end) : run_end(p, end, char_class);
  return {begin, static_cast<std::size_t>(stop - begin)};
}

}  // namespace deltafox
