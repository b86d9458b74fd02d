// Configuration files: JSON as Python's json module reads it, with typed and checked access.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace deltafox::io {

// Foreign text for one line of a message: control characters and bytes that are not UTF-8 become
// \xNN, and long text is cut.
std::string printable(std::string_view text);

enum class JsonDialect : std::uint8_t {
  kStrict,  // keys must be unique
  kPython,  // also Infinity, -Infinity and NaN; of equal keys the last one counts
};

// Throws Error naming `file`, the line and the column if the text is not JSON, is nested deeper
// than 64 levels, or is longer than 128 MiB.
nlohmann::json parse_json(std::string_view text, const std::string& file, JsonDialect dialect);

// The object that a config file holds, or one nested in it. A getter returns the default if the key
// is absent, and throws Error if the value is of another type or out of range:
//   config.json: key 'hidden_size': must be an integer from 1 to 65536, got "abc"
// The optional_ getters return nothing for null, which the others refuse. Immutable; copies share.
class JsonObject {
 public:
  // Python's dialect. Throws Error if the text is not a JSON object.
  static JsonObject parse(std::string_view text, const std::string& file);

  const std::string& file() const { return file_; }
  bool contains(const char* key) const;   // true for null as well
  bool has_value(const char* key) const;  // false for null as well

  std::int64_t integer(const char* key, std::int64_t default_value, std::int64_t min,
                       std::int64_t max) const;
  std::optional<std::int64_t> optional_integer(const char* key,
                                               std::optional<std::int64_t> default_value,
                                               std::int64_t min, std::int64_t max) const;
  // An integer, or nothing for `word`, which is also the default.
  std::optional<std::int64_t> integer_or(const char* key, const char* word, std::int64_t min,
                                         std::int64_t max) const;
  // Integers are numbers. Infinity is one if min or max is; NaN never is in range.
  double number(const char* key, double default_value, double min, double max) const;
  std::optional<double> optional_number(const char* key, std::optional<double> default_value,
                                        double min, double max) const;
  bool boolean(const char* key, bool default_value) const;
  std::string string(const char* key, const std::string& default_value) const;
  std::optional<std::string> optional_string(const char* key,
                                             std::optional<std::string> default_value) const;
  // One of `choices`.
  std::string choice(const char* key, const char* default_value,
                     std::initializer_list<const char*> choices) const;

  // A list, or a single value as a list of one; empty if absent or null.
  std::vector<std::int64_t> integers(const char* key, std::int64_t min, std::int64_t max) const;
  std::vector<double> numbers(const char* key, double min, double max) const;
  std::vector<std::string> strings(const char* key) const;

  // Nothing if absent or null. Messages name keys in it as 'outer.inner'.
  std::optional<JsonObject> object(const char* key) const;

 private:
  JsonObject(std::string file, std::string prefix, std::shared_ptr<const nlohmann::json> value)
      : file_(std::move(file)), prefix_(std::move(prefix)), value_(std::move(value)) {}

  // Null if absent.
  const nlohmann::json* find(const char* key) const;
  [[noreturn]] void refuse(const char* key, const std::string& expected,
                           const nlohmann::json& got) const;
  std::int64_t as_integer(const char* key, const nlohmann::json& value, std::int64_t min,
                          std::int64_t max) const;
  double as_number(const char* key, const nlohmann::json& value, double min, double max) const;
  std::string as_string(const char* key, const nlohmann::json& value) const;
  template <typename Read>
  auto list(const char* key, Read&& read) const;

  std::string file_;
  std::string prefix_;
  std::shared_ptr<const nlohmann::json> value_;
};

}  // namespace deltafox::io
