#include "io/json_escape.h"

#include <optional>

#include "io/utf8.h"

namespace deltafox {
namespace {

constexpr std::string_view kHexDigits = "0123456789abcdef";

void append_unicode_escape(char32_t unit, std::string& out) {
  out += "\\u";
  for (int shift = 12; shift >= 0; shift -= 4) out += kHexDigits[unit >> shift & 0xF];
}

std::optional<char32_t> hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return std::nullopt;
}

bool is_high_surrogate(char32_t c) {
  return c >= 0xD800 && c < 0xDC00;
}
bool is_low_surrogate(char32_t c) {
  return c >= 0xDC00 && c < 0xE000;
}

// Hexadecimal digits of an escape. Python drops what it has read of a malformed one, without the
// first byte that is no digit.
struct HexRun {
  enum Kind { kComplete, kMalformed, kTruncated } kind;
  std::size_t digits;
  char32_t value;
};

HexRun read_hex(std::string_view text, std::size_t count) {
  char32_t value = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (i == text.size()) return {HexRun::kTruncated, i, value};
    const std::optional<char32_t> digit = hex_value(text[i]);
    if (!digit) return {HexRun::kMalformed, i, value};
    value = value << 4 | *digit;
  }
  return {HexRun::kComplete, count, value};
}

std::optional<char32_t> json_character(char c) {
  switch (c) {
    case '"':
    case '\\':
    case '/':
      return c;
    case 'b':
      return '\b';
    case 'f':
      return '\f';
    case 'n':
      return '\n';
    case 'r':
      return '\r';
    case 't':
      return '\t';
    default:
      return std::nullopt;
  }
}

std::optional<char32_t> python_character(char c) {
  switch (c) {
    case '/':
      return std::nullopt;
    case '\'':
      return '\'';
    case 'a':
      return '\a';
    case 'v':
      return '\v';
    default:
      return json_character(c);
  }
}

// One pass over a text. The read_ functions start at a backslash and return the length of the
// escape there, or nothing if more text is needed to tell.
class Unescaper {
 public:
  Unescaper(std::string_view text, bool last, detail::UnescapeState& state, std::string& out)
      : text_(text), last_(last), state_(state), out_(out) {}

  std::size_t run() {
    while (at_ < text_.size()) {
      if (state_.in_name) {
        drop_name();
      } else if (text_[at_] != '\\') {
        copy_plain();
      } else {
        const std::optional<std::size_t> length =
            state_.refused ? read_python_escape() : read_json_escape();
        if (!length) break;
        at_ += *length;
      }
    }
    if (last_) flush_surrogate();
    return at_;
  }

 private:
  void flush_surrogate() {
    if (state_.high_surrogate == 0) return;
    utf8::append(utf8::kReplacement, out_);
    state_.high_surrogate = 0;
  }

  void emit(char32_t c) {
    if (state_.high_surrogate != 0 && is_low_surrogate(c)) {
      const char32_t high = state_.high_surrogate;
      utf8::append(0x10000 + ((high - 0xD800) << 10 | (c - 0xDC00)), out_);
      state_.high_surrogate = 0;
      return;
    }
    flush_surrogate();
    if (is_high_surrogate(c)) {
      state_.high_surrogate = static_cast<char16_t>(c);
    } else {
      utf8::append(is_low_surrogate(c) ? utf8::kReplacement : c, out_);
    }
  }

  // Everything up to the next backslash, or up to what JSON refuses.
  void copy_plain() {
    flush_surrogate();
    const std::size_t begin = at_;
    if (state_.refused) {
      for (; at_ < text_.size() && text_[at_] != '\\'; ++at_) {
        utf8::append(static_cast<unsigned char>(text_[at_]), out_);
      }
      return;
    }
    while (at_ < text_.size() && text_[at_] != '\\') {
      const auto byte = static_cast<unsigned char>(text_[at_]);
      if (byte < 0x20 || byte == '"') {
        state_.refused = true;
        break;
      }
      ++at_;
    }
    out_ += text_.substr(begin, at_ - begin);
  }

  std::optional<std::size_t> read_json_escape() {
    const std::string_view escape = text_.substr(at_);
    bool truncated = escape.size() == 1;
    if (!truncated && escape[1] == 'u') {
      const HexRun hex = read_hex(escape.substr(2), 4);
      if (hex.kind == HexRun::kComplete) {
        emit(hex.value);
        return 6;
      }
      truncated = hex.kind == HexRun::kTruncated;
    } else if (!truncated) {
      if (const std::optional<char32_t> c = json_character(escape[1])) {
        emit(*c);
        return 2;
      }
    }
    if (truncated && !last_) return std::nullopt;
    state_.refused = true;
    return 0;
  }

  std::optional<std::size_t> read_python_escape() {
    const std::string_view escape = text_.substr(at_);
    if (escape.size() == 1) return wait_or_drop(1);
    const char kind = escape[1];
    if (kind == '\n') return 2;
    if (kind >= '0' && kind <= '7') return read_octal(escape);
    if (kind == 'x') return read_python_hex(escape, 2);
    if (kind == 'u') return read_python_hex(escape, 4);
    if (kind == 'U') return read_python_hex(escape, 8);
    if (kind == 'N') return read_name(escape);
    if (const std::optional<char32_t> c = python_character(kind)) {
      emit(*c);
      return 2;
    }
    emit('\\');  // Not an escape: both characters stand for themselves.
    return 1;
  }

  std::optional<std::size_t> wait_or_drop(std::size_t length) const {
    if (last_) return length;
    return std::nullopt;
  }

  std::optional<std::size_t> read_octal(std::string_view escape) {
    char32_t value = 0;
    std::size_t length = 1;
    while (length < 4 && length < escape.size() && escape[length] >= '0' && escape[length] <= '7') {
      value = value << 3 | static_cast<char32_t>(escape[length++] - '0');
    }
    if (length < 4 && length == escape.size() && !last_) return std::nullopt;
    emit(value);
    return length;
  }

  std::optional<std::size_t> read_python_hex(std::string_view escape, std::size_t count) {
    const HexRun hex = read_hex(escape.substr(2), count);
    if (hex.kind == HexRun::kTruncated) return wait_or_drop(2 + hex.digits);
    if (hex.kind == HexRun::kComplete && hex.value <= 0x10FFFF) emit(hex.value);
    return 2 + hex.digits;
  }

  std::optional<std::size_t> read_name(std::string_view escape) {
    if (escape.size() == 2) return wait_or_drop(2);
    if (escape[2] != '{') return 2;
    if (escape.size() == 3) return wait_or_drop(3);
    state_.in_name = escape[3] != '}';  // An empty name is malformed, and its brace stays.
    return 3;
  }

  void drop_name() {
    const std::size_t close = text_.find('}', at_);
    state_.in_name = close == std::string_view::npos;
    at_ = state_.in_name ? text_.size() : close + 1;
  }

  std::string_view text_;
  bool last_;
  detail::UnescapeState& state_;
  std::string& out_;
  std::size_t at_ = 0;
};

}  // namespace

std::string escape_json(std::string_view utf8) {
  std::string out;
  out.reserve(utf8.size() + utf8.size() / 16);
  std::size_t at = 0;
  while (at < utf8.size()) {
    const char c = utf8[at];
    if (c >= ' ' && c <= '~' && c != '"' && c != '\\') {
      out += c;
      ++at;
      continue;
    }
    const char32_t code_point = utf8::next(utf8, at);
    switch (code_point) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      default:
        if (code_point < 0x10000) {
          append_unicode_escape(code_point, out);
        } else {
          append_unicode_escape(0xD800 + ((code_point - 0x10000) >> 10), out);
          append_unicode_escape(0xDC00 + ((code_point - 0x10000) & 0x3FF), out);
        }
    }
  }
  return out;
}

std::size_t unescape(std::string_view text, bool last, detail::UnescapeState& state,
                     std::string& out) {
  return Unescaper(text, last, state, out).run();
}

std::string unescape_all(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  detail::UnescapeState state;
  unescape(text, true, state, out);
  if (!state.refused) return out;
  out.clear();
  state = {};
  state.refused = true;
  unescape(text, true, state, out);
  return out;
}

}  // namespace deltafox
