// The reference results below tests/data/golden.
#pragma once

#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace deltafox::test {

inline std::string golden_path(const std::string& name) {
  return std::string(DELTAFOX_TEST_DATA "/golden/") + name;
}

inline std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// All tensors of a safetensors file, as their bytes.
class GoldenTensors {
 public:
  explicit GoldenTensors(const std::string& path) : text_(read_text(path)) {
    std::uint64_t header_size = 0;
    std::memcpy(&header_size, text_.data(), sizeof(header_size));
    data_ = sizeof(header_size) + header_size;
    header_ = nlohmann::json::parse(text_.substr(sizeof(header_size), header_size));
  }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& [name, entry] : header_.items()) {
      if (name != "__metadata__") names.push_back(name);
    }
    return names;
  }

  // T must be the tensor's type: float for F32, std::int32_t for I32, std::int64_t for I64.
  template <typename T>
  std::vector<T> get(const std::string& name) const {
    const auto& offsets = header_.at(name).at("data_offsets");
    const auto begin = offsets[0].get<std::size_t>();
    std::vector<T> values((offsets[1].get<std::size_t>() - begin) / sizeof(T));
    std::memcpy(values.data(), text_.data() + data_ + begin, values.size() * sizeof(T));
    return values;
  }

  std::string dtype(const std::string& name) const { return header_.at(name).at("dtype"); }

 private:
  std::string text_;
  nlohmann::json header_;
  std::size_t data_ = 0;
};

}  // namespace deltafox::test
