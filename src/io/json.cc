#include "io/json.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "core/error.h"

namespace deltafox::io {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxDepth = 64;
constexpr std::size_t kMaxBytes = std::size_t{128} << 20;
constexpr std::size_t kMaxPrintable = 200;

// Python's Infinity, -Infinity and NaN are not JSON. `text` has zeros in their place, of the same
// length so that lines and columns stay true; `values` has what they stand for, by the ordinal of
// the number in the text.
struct NonFinite {
  std::string text;
  std::map<std::size_t, double> values;
};

NonFinite replace_non_finite(std::string_view text) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  struct Literal {
    std::string_view name;
    std::string_view zero;  // spaces around it: what was not a word of its own must stay an error
    double value;
  };
  static constexpr std::array kLiterals{
      Literal{"Infinity", "   0    ", kInfinity},
      Literal{"-Infinity", "   -0    ", -kInfinity},
      Literal{"NaN", " 0 ", std::numeric_limits<double>::quiet_NaN()},
  };
  NonFinite result{std::string(text), {}};
  std::size_t numbers = 0;
  for (std::size_t i = 0; i < text.size();) {
    const char c = text[i];
    if (c == '"') {  // skip the string
      for (++i; i < text.size() && text[i] != '"'; ++i) {
        if (text[i] == '\\') ++i;
      }
      ++i;
      continue;
    }
    const auto* literal = std::find_if(kLiterals.begin(), kLiterals.end(), [&](const Literal& l) {
      return text.substr(i).starts_with(l.name);
    });
    if (literal != kLiterals.end()) {
      result.text.replace(i, literal->zero.size(), literal->zero);
      result.values[numbers++] = literal->value;
      i += literal->name.size();
    } else if (c == '-' || (c >= '0' && c <= '9')) {
      ++numbers;
      i = std::min(text.find_first_not_of("+-.0123456789eE", i), text.size());
    } else {
      ++i;
    }
  }
  return result;
}

// Builds the value from the parser's events.
class Builder : public nlohmann::json_sax<json> {
 public:
  Builder(JsonDialect dialect, const std::map<std::size_t, double>& non_finite)
      : dialect_(dialect), non_finite_(non_finite) {}

  json take() { return std::move(root_); }
  const std::string& problem() const { return problem_; }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(std::int64_t value) override { return add_number(value); }
  bool number_unsigned(std::uint64_t value) override { return add_number(value); }
  bool number_float(double value, const std::string&) override { return add_number(value); }
  bool string(std::string& value) override { return add(std::move(value)); }
  bool binary(json::binary_t&) override { return false; }  // no such thing in text
  bool start_object(std::size_t) override { return start(json::object()); }
  bool end_object() override { return end(); }
  bool start_array(std::size_t) override { return start(json::array()); }
  bool end_array() override { return end(); }

  bool key(std::string& name) override {
    if (dialect_ == JsonDialect::kStrict && open_.back()->contains(name)) {
      problem_ = fmt::format("key '{}' occurs twice", printable(name));
      return false;
    }
    key_ = std::move(name);
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const json::exception& error) override {
    // Without "[json.exception.parse_error.101] parse error at ".
    std::string_view what = error.what();
    for (const std::string_view prefix : {"] ", "parse error at "}) {
      const std::size_t found = what.find(prefix);
      if (found != std::string_view::npos) what.remove_prefix(found + prefix.size());
    }
    problem_ = fmt::format("is not JSON: {}", printable(what));
    return false;
  }

 private:
  template <typename T>
  bool add_number(T value) {
    const auto found = non_finite_.find(numbers_++);
    return found == non_finite_.end() ? add(value) : add(found->second);
  }

  bool add(json value) {
    insert(std::move(value));
    return true;
  }

  json* insert(json value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    json& parent = *open_.back();
    json& slot = parent.is_array() ? parent.emplace_back(nullptr) : parent[key_];
    slot = std::move(value);
    return &slot;
  }

  bool start(json container) {
    if (open_.size() == kMaxDepth) {
      problem_ = fmt::format("is nested deeper than {} levels", kMaxDepth);
      return false;
    }
    open_.push_back(insert(std::move(container)));
    return true;
  }

  bool end() {
    open_.pop_back();
    return true;
  }

  JsonDialect dialect_;
  const std::map<std::size_t, double>& non_finite_;
  std::size_t numbers_ = 0;
  json root_;
  std::vector<json*> open_;  // the containers around the next value, outermost first
  std::string key_;
  std::string problem_;
};

// As Python writes it: JSON has no non-finite numbers.
std::string describe(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  return fmt::format("{}", value);
}

std::string describe(const json& value) {
  if (value.is_number_float()) return describe(value.get<double>());
  return printable(value.dump(-1, ' ', false, json::error_handler_t::replace));
}

}  // namespace

std::string printable(std::string_view text) {
  std::string result;
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  for (std::size_t i = 0; i < text.size();) {
    if (result.size() >= kMaxPrintable) return result + "...";
    utf8proc_int32_t codepoint = -1;
    const auto left = static_cast<utf8proc_ssize_t>(text.size() - i);
    const utf8proc_ssize_t length = utf8proc_iterate(bytes + i, left, &codepoint);
    if (length <= 0 || codepoint < 0x20 || (codepoint >= 0x7f && codepoint < 0xa0)) {
      result += fmt::format("\\x{:02x}", bytes[i]);
      ++i;
    } else {
      result += text.substr(i, static_cast<std::size_t>(length));
      i += static_cast<std::size_t>(length);
    }
  }
  return result;
}

json parse_json(std::string_view text, const std::string& file, JsonDialect dialect) {
  if (text.size() > kMaxBytes) fail("{}: is longer than {} bytes", file, kMaxBytes);
  // The parser takes a NUL byte for the end of the text.
  if (text.find('\0') != std::string_view::npos) fail("{}: is not JSON: contains a NUL byte", file);
  NonFinite non_finite;
  const bool python = dialect == JsonDialect::kPython;
  if (python && (text.find("Infinity") != text.npos || text.find("NaN") != text.npos)) {
    non_finite = replace_non_finite(text);
    text = non_finite.text;
  }
  Builder builder(dialect, non_finite.values);
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    fail("{}: {}", file, builder.problem());
  }
  return builder.take();
}

JsonObject JsonObject::parse(std::string_view text, const std::string& file) {
  auto value = std::make_shared<const json>(parse_json(text, file, JsonDialect::kPython));
  if (!value->is_object()) fail("{}: must hold a JSON object, got {}", file, describe(*value));
  return {file, "", std::move(value)};
}

const json* JsonObject::find(const char* key) const {
  const auto found = value_->find(key);
  return found == value_->end() ? nullptr : &*found;
}

bool JsonObject::contains(const char* key) const {
  return find(key) != nullptr;
}

bool JsonObject::has_value(const char* key) const {
  const json* value = find(key);
  return value != nullptr && !value->is_null();
}

void JsonObject::refuse(const char* key, const std::string& expected, const json& got) const {
  fail("{}: key '{}{}': must be {}, got {}", file_, prefix_, key, expected, describe(got));
}

std::int64_t JsonObject::as_integer(const char* key, const json& value, std::int64_t min,
                                    std::int64_t max) const {
  // Beyond int64 the parser makes an unsigned number, which no range of int64 contains.
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() ||
                     value.get<std::uint64_t>() <=
                         static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()));
  if (!fits || value.get<std::int64_t>() < min || value.get<std::int64_t>() > max) {
    refuse(key, fmt::format("an integer from {} to {}", min, max), value);
  }
  return value.get<std::int64_t>();
}

double JsonObject::as_number(const char* key, const json& value, double min, double max) const {
  const bool in_range =
      value.is_number() && value.get<double>() >= min && value.get<double>() <= max;
  if (!in_range) {
    refuse(key, fmt::format("a number from {} to {}", describe(min), describe(max)), value);
  }
  return value.get<double>();
}

std::string JsonObject::as_string(const char* key, const json& value) const {
  if (!value.is_string()) refuse(key, "a string", value);
  return value.get<std::string>();
}

std::int64_t JsonObject::integer(const char* key, std::int64_t default_value, std::int64_t min,
                                 std::int64_t max) const {
  const json* value = find(key);
  return value == nullptr ? default_value : as_integer(key, *value, min, max);
}

std::optional<std::int64_t> JsonObject::optional_integer(const char* key,
                                                         std::optional<std::int64_t> default_value,
                                                         std::int64_t min, std::int64_t max) const {
  const json* value = find(key);
  if (value == nullptr) return default_value;
  if (value->is_null()) return std::nullopt;
  return as_integer(key, *value, min, max);
}

std::optional<std::int64_t> JsonObject::integer_or(const char* key, const char* word,
                                                   std::int64_t min, std::int64_t max) const {
  const json* value = find(key);
  if (value == nullptr || *value == word) return std::nullopt;
  if (value->is_string()) {
    refuse(key, fmt::format("\"{}\" or an integer from {} to {}", word, min, max), *value);
  }
  return as_integer(key, *value, min, max);
}

double JsonObject::number(const char* key, double default_value, double min, double max) const {
  const json* value = find(key);
  return value == nullptr ? default_value : as_number(key, *value, min, max);
}

std::optional<double> JsonObject::optional_number(const char* key,
                                                  std::optional<double> default_value, double min,
                                                  double max) const {
  const json* value = find(key);
  if (value == nullptr) return default_value;
  if (value->is_null()) return std::nullopt;
  return as_number(key, *value, min, max);
}

bool JsonObject::boolean(const char* key, bool default_value) const {
  const json* value = find(key);
  if (value == nullptr) return default_value;
  if (!value->is_boolean()) refuse(key, "true or false", *value);
  return value->get<bool>();
}

std::string JsonObject::string(const char* key, const std::string& default_value) const {
  const json* value = find(key);
  return value == nullptr ? default_value : as_string(key, *value);
}

std::optional<std::string> JsonObject::optional_string(
    const char* key, std::optional<std::string> default_value) const {
  const json* value = find(key);
  if (value == nullptr) return default_value;
  if (value->is_null()) return std::nullopt;
  return as_string(key, *value);
}

std::string JsonObject::choice(const char* key, const char* default_value,
                               std::initializer_list<const char*> choices) const {
  const json* value = find(key);
  if (value == nullptr) return default_value;
  for (const char* name : choices) {
    if (*value == name) return name;
  }
  refuse(key, fmt::format("one of \"{}\"", fmt::join(choices, "\", \"")), *value);
}

template <typename Read>
auto JsonObject::list(const char* key, Read&& read) const {
  std::vector<decltype(read(*value_))> values;
  const json* value = find(key);
  if (value == nullptr || value->is_null()) return values;
  if (!value->is_array()) {
    values.push_back(read(*value));
    return values;
  }
  values.reserve(value->size());
  for (const json& element : *value) values.push_back(read(element));
  return values;
}

std::vector<std::int64_t> JsonObject::integers(const char* key, std::int64_t min,
                                               std::int64_t max) const {
  return list(key, [&](const json& value) { return as_integer(key, value, min, max); });
}

std::vector<double> JsonObject::numbers(const char* key, double min, double max) const {
  return list(key, [&](const json& value) { return as_number(key, value, min, max); });
}

std::vector<std::string> JsonObject::strings(const char* key) const {
  return list(key, [&](const json& value) { return as_string(key, value); });
}

std::optional<JsonObject> JsonObject::object(const char* key) const {
  const json* value = find(key);
  if (value == nullptr || value->is_null()) return std::nullopt;
  if (!value->is_object()) refuse(key, "an object", *value);
  // Shares ownership of the whole document.
  return JsonObject(file_, fmt::format("{}{}.", prefix_, key), {value_, value});
}

}  // namespace deltafox::io
