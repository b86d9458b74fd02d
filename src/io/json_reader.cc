#include "io/json_reader.h"

#include <algorithm>
#include <charconv>

#include "core/error.h"
#include "io/utf8.h"

namespace deltafox {

JsonReader::JsonReader(std::string_view text, std::string_view file) : text_(text), file_(file) {
  at_ = utf8::first_invalid(text);
  if (at_ != std::string_view::npos) fail_here("not UTF-8");
  at_ = 0;
}

std::size_t JsonReader::line() const {
  const std::string_view before = text_.substr(0, at_);
  return 1 + static_cast<std::size_t>(std::count(before.begin(), before.end(), '\n'));
}

void JsonReader::fail_here(std::string_view message) const {
  const std::size_t line_start = text_.substr(0, at_).rfind('\n') + 1;  // npos + 1 = 0
  fail("{}: line {}, byte {}: {}", file_, line(), at_ - line_start + 1, message);
}

void JsonReader::skip_space() {
  while (at_ < text_.size() &&
         (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) {
    ++at_;
  }
}

char JsonReader::peek() {
  skip_space();
  return at_ < text_.size() ? text_[at_] : '\0';
}

void JsonReader::expect(char c) {
  if (peek() != c) fail_here(fmt::format("expected '{}'", c));
  ++at_;
}

void JsonReader::enter(char open) {
  expect(open);
  first_ = true;
}

bool JsonReader::next(char close) {
  if (peek() == close) {
    ++at_;
    first_ = false;
    return false;
  }
  if (!first_) expect(',');
  first_ = false;
  return true;
}

bool JsonReader::next_member(std::string& key) {
  if (!next('}')) return false;
  read_string(key);
  expect(':');
  return true;
}

bool JsonReader::next_element() {
  return next(']');
}

void JsonReader::read_string(std::string& out) {
  if (peek() != '"') fail_here("expected a string");
  ++at_;
  out.clear();
  for (;;) {
    const std::size_t begin = at_;
    while (at_ < text_.size() && text_[at_] != '"' && text_[at_] != '\\' &&
           static_cast<unsigned char>(text_[at_]) >= 0x20) {
      ++at_;
    }
    out += text_.substr(begin, at_ - begin);
    if (at_ == text_.size()) fail_here("the string does not end");
    if (text_[at_] == '"') break;
    if (text_[at_] != '\\') fail_here("a control character in a string");
    read_escape(out);
  }
  ++at_;
}

// Four hexadecimal digits.
char32_t JsonReader::read_unit() {
  unsigned value = 0;
  const std::string_view digits = text_.substr(std::min(at_, text_.size()), 4);
  const auto [stop, error] =
      std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
  if (error != std::errc() || digits.size() != 4 || stop != digits.data() + 4) {
    fail_here("a malformed \\u escape");
  }
  at_ += 4;
  return value;
}

void JsonReader::read_escape(std::string& out) {
  constexpr std::string_view kNames = "\"\\/bfnrt";
  constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
  ++at_;
  const char kind = at_ < text_.size() ? text_[at_] : '\0';
  const std::size_t simple = kNames.find(kind);
  if (simple != std::string_view::npos) {
    out += kMeanings[simple];
    ++at_;
    return;
  }
  if (kind != 'u') fail_here("an unknown escape in a string");
  ++at_;
  char32_t c = read_unit();
  if (c >= 0xD800 && c < 0xE000) {
    if (c >= 0xDC00 || text_.substr(at_, 2) != "\\u") fail_here("half a surrogate pair");
    at_ += 2;
    const char32_t low = read_unit();
    if (low < 0xDC00 || low >= 0xE000) fail_here("half a surrogate pair");
    c = 0x10000 + ((c - 0xD800) << 10 | (low - 0xDC00));
  }
  utf8::append(c, out);
}

std::int64_t JsonReader::read_integer() {
  peek();
  std::int64_t value = 0;
  const char* const end = text_.data() + text_.size();
  const auto [stop, error] = std::from_chars(text_.data() + at_, end, value);
  const bool fraction = stop < end && (*stop == '.' || *stop == 'e' || *stop == 'E');
  if (error != std::errc() || fraction) fail_here("expected an integer");
  at_ = static_cast<std::size_t>(stop - text_.data());
  return value;
}

void JsonReader::skip_string() {
  for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
    if (text_[at_] == '\\') ++at_;
  }
  if (at_ >= text_.size()) {
    at_ = text_.size();
    fail_here("the string does not end");
  }
  ++at_;
}

std::string_view JsonReader::skip_value() {
  peek();
  const std::size_t begin = at_;
  std::size_t depth = 0;
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (depth == 0 && (c == ',' || c == '}' || c == ']')) break;
    if (c == '"') {
      skip_string();
      continue;
    }
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    ++at_;
  }
  if (at_ == begin || depth != 0) fail_here("expected a value");
  return text_.substr(begin, at_ - begin);
}

void JsonReader::finish() {
  if (peek() != '\0' || at_ != text_.size()) fail_here("something follows the end");
}

}  // namespace deltafox
