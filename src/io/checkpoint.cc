// The files of a checkpoint as one set of tensors.
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>

#include "core/error.h"
#include "io/json.h"
#include "io/safetensors.h"

namespace deltafox::io {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr std::size_t kMaxIndexBytes = std::size_t{64} << 20;

// A plain name: a checkpoint must not reach outside its directory.
bool is_file_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
}

// tensor name -> file name
std::map<std::string, std::string> read_index(const std::string& path) {
  const json index = parse_json(read_text_file(path, kMaxIndexBytes), path, JsonDialect::kStrict);
  if (!index.is_object()) fail("{}: must hold a JSON object", path);
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end() || !weight_map->is_object() || weight_map->empty()) {
    fail("{}: key 'weight_map': must be an object from tensor names to file names", path);
  }
  std::map<std::string, std::string> files;
  for (const auto& [tensor, file] : weight_map->items()) {
    if (!file.is_string() || !is_file_name(file.get_ref<const std::string&>())) {
      fail("{}: tensor '{}': must be mapped to the name of a file beside the index", path,
           printable(tensor));
    }
    files[tensor] = file.get<std::string>();
  }
  return files;
}

}  // namespace

Checkpoint Checkpoint::open(const std::string& directory) {
  std::error_code ignored;  // what cannot be looked at is not there
  if (!fs::is_directory(directory, ignored)) fail("{}: is not a directory", directory);
  Checkpoint checkpoint;
  checkpoint.path_ = directory;
  const fs::path base(directory);
  const std::string single = (base / kSingle).string();
  const std::string index = (base / kIndex).string();
  if (fs::exists(single, ignored)) {
    checkpoint.add(SafetensorsFile::open(single));
    return checkpoint;
  }
  if (!fs::exists(index, ignored)) fail("{}: holds neither {} nor {}", directory, kSingle, kIndex);
  const std::map<std::string, std::string> weight_map = read_index(index);
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : weight_map) shards.insert(shard);
  for (const std::string& shard : shards) {
    checkpoint.add(SafetensorsFile::open((base / shard).string()));
  }
  for (const auto& [tensor, shard] : weight_map) {
    const std::string path = (base / shard).string();
    if (!checkpoint.contains(tensor) || checkpoint.file_of(tensor) != path) {
      fail("{}: tensor '{}' is missing, though {} lists it", path, printable(tensor), kIndex);
    }
  }
  return checkpoint;
}

void Checkpoint::add(SafetensorsFile file) {
  const SafetensorsFile& added = files_.emplace_back(std::move(file));
  for (const TensorEntry& tensor : added.tensors()) {
    const auto [entry, is_new] = entries_.emplace(tensor.name, &added);
    if (!is_new) {
      fail("{}: tensor '{}' is also in {}", added.path(), printable(tensor.name),
           entry->second->path());
    }
  }
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  names.reserve(entries_.size());
  for (const auto& [name, file] : entries_) names.emplace_back(name);
  return names;
}

const TensorEntry* Checkpoint::find(std::string_view name) const {
  const auto found = entries_.find(name);
  return found == entries_.end() ? nullptr : found->second->find(name);
}

ConstTensorView Checkpoint::view(std::string_view name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) fail("{}: tensor '{}' is missing", path_, printable(name));
  return found->second->view(name);
}

const std::string& Checkpoint::file_of(std::string_view name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) fail("{}: tensor '{}' is missing", path_, printable(name));
  return found->second->path();
}

}  // namespace deltafox::io
