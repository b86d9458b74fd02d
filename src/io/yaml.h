// Configuration in YAML: files that build on one another, values that refer to one another, and
// typed access that knows where each value stands.
//
//   defaults:                 read first, in this order, and overridden by what follows:
//     - ../base               another file, relative to this one, without .yaml
//     - override /model: x    the same as  model: {name: x}  (as Hydra writes it)
//   peak_value: ${optimizer.lr}   the value of another key
//   output_dir: ???               has to be given, by a later file or on the command line
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace deltafox::io {

struct YamlNode {
  enum class Kind : std::uint8_t { kNull, kScalar, kList, kMap };
  Kind kind = Kind::kNull;
  std::string where = {};            // "config.yaml: line 7"
  std::string scalar = {};           // of kScalar
  bool quoted = false;               // of kScalar: it is text whatever it looks like
  std::vector<YamlNode> items = {};  // of kList, and the values of kMap
  std::vector<std::pair<std::string, std::string>> keys = {};  // of kMap: name, and where it stands

  const YamlNode* find(const std::string& key) const;
  YamlNode& operator[](const std::string& key);  // made if there is none
};

// Reads the file and those that it builds on, and then sets "a.b=value" as each override says.
// Throws Error that names the file and line, or the override.
YamlNode load_yaml(const std::string& path, std::span<const std::string> overrides = {});

// The scalar, list or map as JSON: unquoted scalars are null, booleans or numbers where they look
// like one.
nlohmann::ordered_json to_json(const YamlNode& node);

// A map of the tree. A getter throws Error if the value is of another type, out of range or ???,
// and, without a default, if it is absent. close() throws Error naming a key that no getter asked
// for, and its file and line.
class YamlMap {
 public:
  explicit YamlMap(const YamlNode& node) : YamlMap(node, "", node.where) {}

  // Where the value stands: a file and line or an override; where the map does, if it is absent.
  std::string where(const std::string& key) const;
  std::string name(const std::string& key) const { return prefix_ + key; }
  bool has(const std::string& key);  // false for null as well

  std::int64_t integer(const std::string& key, std::int64_t min, std::int64_t max,
                       std::optional<std::int64_t> default_value = std::nullopt);
  double number(const std::string& key, double min, double max,
                std::optional<double> default_value = std::nullopt);
  bool boolean(const std::string& key, std::optional<bool> default_value = std::nullopt);
  std::string string(const std::string& key,
                     const std::optional<std::string>& default_value = std::nullopt);
  std::vector<double> numbers(const std::string& key, double min, double max);
  // An empty map where it is absent.
  YamlMap map(const std::string& key);
  // Takes the value as it is; null if absent.
  const YamlNode* raw(const std::string& key);
  // Accepted and without effect.
  void ignore(const std::string& key) { raw(key); }

  void close() const;

 private:
  YamlMap(const YamlNode& node, std::string prefix, std::string where)
      : node_(&node), prefix_(std::move(prefix)), where_(std::move(where)) {}

  const YamlNode* take(const std::string& key);
  const YamlNode& scalar(const std::string& key, const char* expected);
  [[noreturn]] void refuse(const std::string& key, const std::string& expected,
                           const YamlNode& got) const;

  const YamlNode* node_;
  std::string prefix_;
  std::string where_;
  std::vector<std::string> asked_;
};

}  // namespace deltafox::io
