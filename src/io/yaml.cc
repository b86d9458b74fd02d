#include "io/yaml.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "io/file.h"
#include "io/json.h"

namespace deltafox::io {
namespace {

constexpr std::size_t kMaxFileBytes = std::size_t{1} << 20;
constexpr int kMaxYamlDepth = 32;
// Aliases let a small file stand for a huge tree.
constexpr int kMaxNodes = 100'000;

std::string place(const std::string& file, const YAML::Mark& mark) {
  return fmt::format("{}: line {}", file, mark.line + 1);
}

class Converter {
 public:
  explicit Converter(const std::string& file) : file_(file) {}

  YamlNode convert(const YAML::Node& from, int depth = 0) {
    YamlNode node;
    node.where = place(file_, from.Mark());
    if (depth > kMaxYamlDepth) fail("{}: nested deeper than {} levels", node.where, kMaxYamlDepth);
    if (++count_ > kMaxNodes) fail("{}: more than {} values", node.where, kMaxNodes);
    switch (from.Type()) {
      case YAML::NodeType::Scalar:
        node.kind = YamlNode::Kind::kScalar;
        node.scalar = from.Scalar();
        node.quoted = from.Tag() == "!";
        break;
      case YAML::NodeType::Sequence:
        node.kind = YamlNode::Kind::kList;
        for (const YAML::Node& item : from) node.items.push_back(convert(item, depth + 1));
        break;
      case YAML::NodeType::Map:
        node.kind = YamlNode::Kind::kMap;
        for (const auto& entry : from) add_entry(entry.first, entry.second, depth, node);
        break;
      case YAML::NodeType::Null:
      case YAML::NodeType::Undefined:
        break;
    }
    return node;
  }

 private:
  void add_entry(const YAML::Node& key, const YAML::Node& value, int depth, YamlNode& node) {
    const std::string where = place(file_, key.Mark());
    if (!key.IsScalar()) fail("{}: a key must be a name", where);
    if (node.find(key.Scalar()) != nullptr) {
      fail("{}: key '{}' is there twice", where, printable(key.Scalar()));
    }
    node[key.Scalar()] = convert(value, depth + 1);
    node.keys.back().second = where;
  }

  const std::string& file_;
  int count_ = 0;
};

YamlNode parse(const std::string& text, const std::string& file) {
  try {
    return Converter(file).convert(YAML::Load(text));
  } catch (const YAML::Exception& error) {
    fail("{}: {}", place(file, error.mark), printable(error.msg));
  }
}

void merge_key(YamlNode& into, const std::string& key, const std::string& where,
               const YamlNode& value);

// Maps merge key by key; anything else is replaced.
void merge(YamlNode& into, const YamlNode& from) {
  if (into.kind != YamlNode::Kind::kMap || from.kind != YamlNode::Kind::kMap) {
    into = from;
    return;
  }
  for (std::size_t i = 0; i < from.keys.size(); ++i) {
    merge_key(into, from.keys[i].first, from.keys[i].second, from.items[i]);
  }
}

void merge_key(YamlNode& into, const std::string& key, const std::string& where,
               const YamlNode& value) {
  merge(into[key], value);
  const auto entry = std::find_if(into.keys.begin(), into.keys.end(),
                                  [&](const auto& other) { return other.first == key; });
  entry->second = where;
}

YamlNode load_file(const std::string& path, int depth);

// One entry of `defaults`.
void apply_default(const YamlNode& entry, const std::string& path, int depth, YamlNode& into) {
  if (entry.kind == YamlNode::Kind::kScalar) {
    if (entry.scalar == "_self_") return;
    const std::filesystem::path base = std::filesystem::path(path).parent_path() / entry.scalar;
    return merge(into, load_file(base.string() + ".yaml", depth + 1));
  }
  constexpr std::string_view kOverride = "override /";
  if (entry.kind == YamlNode::Kind::kMap && entry.keys.size() == 1 &&
      entry.keys[0].first.starts_with(kOverride) &&
      entry.items[0].kind == YamlNode::Kind::kScalar) {
    YamlNode named{.kind = YamlNode::Kind::kMap, .where = entry.where};
    named["name"] = entry.items[0];
    const std::string group = entry.keys[0].first.substr(kOverride.size());
    return merge_key(into, group, entry.where, named);
  }
  fail("{}: expected the name of a file or 'override /group: name'", entry.where);
}

YamlNode load_file(const std::string& path, int depth) {
  constexpr int kMaxFiles = 8;
  if (depth > kMaxFiles) fail("{}: the files build on one another in a circle", path);
  const YamlNode own = parse(read_text_file(path, kMaxFileBytes), path);
  if (own.kind != YamlNode::Kind::kMap) fail("{}: line 1: expected keys and values", path);
  YamlNode tree;
  tree.kind = YamlNode::Kind::kMap;
  tree.where = path;
  if (const YamlNode* defaults = own.find("defaults")) {
    if (defaults->kind != YamlNode::Kind::kList) fail("{}: expected a list", defaults->where);
    for (const YamlNode& entry : defaults->items) apply_default(entry, path, depth, tree);
  }
  for (std::size_t i = 0; i < own.keys.size(); ++i) {
    const auto& [key, where] = own.keys[i];
    if (key != "defaults") merge_key(tree, key, where, own.items[i]);
  }
  return tree;
}

void set_where(YamlNode& node, const std::string& where) {
  node.where = where;
  for (auto& key : node.keys) key.second = where;
  for (YamlNode& item : node.items) set_where(item, where);
}

void apply_override(const std::string& text, YamlNode& tree) {
  const std::size_t equals = text.find('=');
  const std::string path = text.substr(0, equals);
  if (equals == std::string::npos || path.empty()) {
    fail("'{}': expected key=value", printable(text));
  }
  const std::string where = fmt::format("'{}'", printable(text));
  YamlNode value = parse(text.substr(equals + 1), "value");
  set_where(value, where);
  for (std::size_t end = path.size(); end != std::string::npos;) {
    const std::size_t dot = end == 0 ? std::string::npos : path.rfind('.', end - 1);
    const std::size_t begin = dot == std::string::npos ? 0 : dot + 1;
    if (begin == end) fail("{}: expected key=value", where);
    YamlNode outer{.kind = YamlNode::Kind::kMap, .where = where};
    outer[path.substr(begin, end - begin)] = std::move(value);
    value = std::move(outer);
    end = dot;
  }
  merge(tree, value);
}

// The node at "a.b.c", or null.
const YamlNode* find_path(const YamlNode& tree, const std::string& path) {
  const YamlNode* node = &tree;
  for (std::size_t begin = 0; node != nullptr && begin <= path.size();) {
    const std::size_t end = std::min(path.find('.', begin), path.size());
    node = node->find(path.substr(begin, end - begin));
    begin = end + 1;
  }
  return node;
}

// Replaces every ${...} in scalars by the scalar that it refers to.
void resolve(YamlNode& node, const YamlNode& tree) {
  for (YamlNode& item : node.items) resolve(item, tree);
  int steps = 0;
  for (std::size_t begin = 0; (begin = node.scalar.find("${")) != std::string::npos; ++steps) {
    const std::size_t end = node.scalar.find('}', begin);
    const YamlNode* target = end == std::string::npos
                                 ? nullptr
                                 : find_path(tree, node.scalar.substr(begin + 2, end - begin - 2));
    if (steps > kMaxYamlDepth || target == nullptr || target->kind != YamlNode::Kind::kScalar) {
      fail("{}: '{}' refers to no value", node.where, printable(node.scalar));
    }
    node.scalar.replace(begin, end + 1 - begin, target->scalar);
  }
}

bool is_null(const YamlNode& node) {
  return node.kind == YamlNode::Kind::kNull ||
         (node.kind == YamlNode::Kind::kScalar && !node.quoted &&
          (node.scalar == "null" || node.scalar == "~" || node.scalar.empty()));
}

std::optional<bool> as_boolean(const YamlNode& node) {
  if (node.quoted) return std::nullopt;
  if (node.scalar == "true" || node.scalar == "True") return true;
  if (node.scalar == "false" || node.scalar == "False") return false;
  return std::nullopt;
}

template <typename T>
std::optional<T> as_number(const YamlNode& node) {
  T value{};
  const char* const end = node.scalar.data() + node.scalar.size();
  const auto [rest, error] = std::from_chars(node.scalar.data(), end, value);
  if (node.quoted || error != std::errc() || rest != end) return std::nullopt;
  return value;
}

}  // namespace

const YamlNode* YamlNode::find(const std::string& key) const {
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (keys[i].first == key) return &items[i];
  }
  return nullptr;
}

YamlNode& YamlNode::operator[](const std::string& key) {
  if (kind != Kind::kMap) *this = {.kind = Kind::kMap, .where = where};
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (keys[i].first == key) return items[i];
  }
  keys.emplace_back(key, where);
  items.emplace_back().where = where;
  return items.back();
}

YamlNode load_yaml(const std::string& path, std::span<const std::string> overrides) {
  YamlNode tree = load_file(path, 0);
  for (const std::string& text : overrides) apply_override(text, tree);
  const YamlNode unresolved = tree;
  resolve(tree, unresolved);
  return tree;
}

nlohmann::ordered_json to_json(const YamlNode& node) {
  if (is_null(node)) return nullptr;
  if (node.kind == YamlNode::Kind::kList) {
    auto list = nlohmann::ordered_json::array();
    for (const YamlNode& item : node.items) list.push_back(to_json(item));
    return list;
  }
  if (node.kind == YamlNode::Kind::kMap) {
    auto map = nlohmann::ordered_json::object();
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      map[node.keys[i].first] = to_json(node.items[i]);
    }
    return map;
  }
  if (const auto value = as_boolean(node)) return *value;
  if (const auto value = as_number<std::int64_t>(node)) return *value;
  if (const auto value = as_number<double>(node)) return *value;
  return node.scalar;
}

std::string YamlMap::where(const std::string& key) const {
  const YamlNode* node = node_->find(key);
  return node != nullptr ? node->where : where_;
}

const YamlNode* YamlMap::take(const std::string& key) {
  asked_.push_back(key);
  const YamlNode* node = node_->find(key);
  if (node == nullptr || is_null(*node)) return nullptr;
  if (node->kind == YamlNode::Kind::kScalar && node->scalar == "???") {
    fail("{}: key '{}': has to be given, as in {}=...", where(key), name(key), name(key));
  }
  return node;
}

void YamlMap::refuse(const std::string& key, const std::string& expected,
                     const YamlNode& got) const {
  const std::string shown = got.kind == YamlNode::Kind::kScalar ? printable(got.scalar)
                            : got.kind == YamlNode::Kind::kList ? "a list"
                                                                : "a map";
  fail("{}: key '{}': must be {}, got {}", where(key), name(key), expected, shown);
}

const YamlNode& YamlMap::scalar(const std::string& key, const char* expected) {
  const YamlNode* node = take(key);
  if (node == nullptr) fail("{}: key '{}': is missing", where_, name(key));
  if (node->kind != YamlNode::Kind::kScalar) refuse(key, expected, *node);
  return *node;
}

bool YamlMap::has(const std::string& key) {
  return take(key) != nullptr;
}

std::int64_t YamlMap::integer(const std::string& key, std::int64_t min, std::int64_t max,
                              std::optional<std::int64_t> default_value) {
  if (default_value && !has(key)) return *default_value;
  const YamlNode& node = scalar(key, "a whole number");
  const auto value = as_number<std::int64_t>(node);
  if (!value || *value < min || *value > max) {
    refuse(key, fmt::format("a whole number from {} to {}", min, max), node);
  }
  return *value;
}

double YamlMap::number(const std::string& key, double min, double max,
                       std::optional<double> default_value) {
  if (default_value && !has(key)) return *default_value;
  const YamlNode& node = scalar(key, "a number");
  const auto value = as_number<double>(node);
  if (!value || !(*value >= min && *value <= max)) {
    refuse(key, fmt::format("a number from {} to {}", min, max), node);
  }
  return *value;
}

bool YamlMap::boolean(const std::string& key, std::optional<bool> default_value) {
  if (default_value && !has(key)) return *default_value;
  const YamlNode& node = scalar(key, "true or false");
  const auto value = as_boolean(node);
  if (!value) refuse(key, "true or false", node);
  return *value;
}

std::string YamlMap::string(const std::string& key,
                            const std::optional<std::string>& default_value) {
  if (default_value && !has(key)) return *default_value;
  return scalar(key, "text").scalar;
}

std::vector<double> YamlMap::numbers(const std::string& key, double min, double max) {
  const YamlNode* node = take(key);
  if (node == nullptr) fail("{}: key '{}': is missing", where_, name(key));
  if (node->kind != YamlNode::Kind::kList) refuse(key, "a list of numbers", *node);
  std::vector<double> values;
  for (const YamlNode& item : node->items) {
    const auto value = as_number<double>(item);
    if (item.kind != YamlNode::Kind::kScalar || !value || !(*value >= min && *value <= max)) {
      refuse(key, fmt::format("a list of numbers from {} to {}", min, max), item);
    }
    values.push_back(*value);
  }
  return values;
}

YamlMap YamlMap::map(const std::string& key) {
  static const YamlNode empty{.kind = YamlNode::Kind::kMap};
  const YamlNode* node = take(key);
  if (node != nullptr && node->kind != YamlNode::Kind::kMap) refuse(key, "a map", *node);
  return {node != nullptr ? *node : empty, name(key) + ".", where(key)};
}

const YamlNode* YamlMap::raw(const std::string& key) {
  asked_.push_back(key);
  return node_->find(key);
}

void YamlMap::close() const {
  for (const auto& [key, where] : node_->keys) {
    if (std::find(asked_.begin(), asked_.end(), key) == asked_.end()) {
      fail("{}: key '{}' is unknown", where, printable(prefix_ + key));
    }
  }
}

}  // namespace deltafox::io
