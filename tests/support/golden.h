// The golden cases in tests/data/golden, and short ways to run a model on them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "deltafox/model.h"
#include "io/safetensors.h"

namespace deltafox::test {

class Golden {
 public:
  static std::vector<std::string> cases() {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(root())) {
      const std::string name = entry.path().filename().string();
      if (entry.is_directory()) names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    return names;
  }

  // Of a parametrised test's case.
  static std::string test_name(const testing::TestParamInfo<std::string>& info) {
    std::string name = info.param;
    std::replace(name.begin(), name.end(), '-', '_');
    return name;
  }

  explicit Golden(const std::string& name)
      : directory_(root() + "/" + name),
        expected_(io::SafetensorsFile::open(directory_ + "/expected.safetensors")) {}

  const std::string& directory() const { return directory_; }

  bool contains(const std::string& name) const { return expected_.contains(name); }
  // Of the official models, these give hidden states behind each layer, the others before it.
  bool hidden_states_follow_layers() const {
    const std::string name = std::filesystem::path(directory_).filename().string();
    return name.starts_with("mamba2-") || name.starts_with("samba-");
  }
  std::span<const float> floats(const std::string& name) const {
    const ConstTensorView view = expected_.view(name);
    return {view.f32(), static_cast<std::size_t>(view.shape.size())};
  }
  std::vector<std::int32_t> ids(const std::string& name) const {
    const ConstTensorView view = expected_.view(name);
    const auto* begin = static_cast<const std::int32_t*>(view.data);
    return {begin, begin + view.shape.size()};
  }
  // [B, T] as B vectors.
  std::vector<std::vector<std::int32_t>> rows(const std::string& name) const {
    const ConstTensorView view = expected_.view(name);
    const auto* data = static_cast<const std::int32_t*>(view.data);
    std::vector<std::vector<std::int32_t>> result;
    for (std::int64_t b = 0; b < view.shape[0]; ++b) {
      result.emplace_back(data + b * view.shape[1], data + (b + 1) * view.shape[1]);
    }
    return result;
  }

 private:
  static std::string root() { return std::string(DELTAFOX_TEST_DATA) + "/golden"; }

  std::string directory_;
  io::SafetensorsFile expected_;
};

// A ragged batch that owns its ids.
class Packed {
 public:
  explicit Packed(const std::vector<std::vector<std::int32_t>>& sequences) {
    for (const auto& sequence : sequences) {
      ids_.insert(ids_.end(), sequence.begin(), sequence.end());
      cu_seqlens_.push_back(static_cast<std::int64_t>(ids_.size()));
    }
  }
  Batch batch() const { return {ids_, cu_seqlens_}; }

 private:
  std::vector<std::int32_t> ids_;
  std::vector<std::int64_t> cu_seqlens_{0};
};

inline std::vector<State*> pointers(std::vector<State>& states) {
  std::vector<State*> result;
  for (State& state : states) result.push_back(&state);
  return result;
}

// Logits of all tokens, packed [T, N].
inline std::vector<float> logits(const Model& model,
                                 const std::vector<std::vector<std::int32_t>>& sequences,
                                 std::vector<State>& states) {
  std::vector<float> result;
  model.logits(Packed(sequences).batch(), pointers(states),
               [&](std::int64_t, std::int64_t rows, const float* data) {
                 result.insert(result.end(), data, data + rows * model.info().vocab_size);
               });
  return result;
}

}  // namespace deltafox::test
