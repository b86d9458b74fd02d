// A pull reader for JSON files with hundreds of thousands of entries: no tree is built. The caller
// asks for what the format says comes next; anything else is an Error that names file and line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace deltafox {

class JsonReader {
 public:
  // Neither text is copied. Throws if `text` is not UTF-8.
  JsonReader(std::string_view text, std::string_view file);

  // reader.enter('{'); while (reader.next_member(key)) { read or skip one value }
  // reader.enter('['); while (reader.next_element()) { read or skip one value }
  void enter(char open);
  bool next_member(std::string& key);
  bool next_element();

  void read_string(std::string& out);
  std::int64_t read_integer();
  // The value's text, not checked any further.
  std::string_view skip_value();
  // First character of the value that comes next; 0 at the end.
  char peek();
  // Only white space may be left.
  void finish();

  std::size_t line() const;
  [[noreturn]] void fail_here(std::string_view message) const;

 private:
  void skip_space();
  bool next(char close);
  void expect(char c);
  void skip_string();
  void read_escape(std::string& out);
  char32_t read_unit();

  std::string_view text_;
  std::string_view file_;
  std::size_t at_ = 0;
  bool first_ = false;  // nothing of the innermost object or array has been read
};

}  // namespace deltafox
