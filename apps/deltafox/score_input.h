// The ids that `logits` and `loss` read: from a safetensors file, a text or the command line.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common.h"
#include "infer/padded_batch.h"

namespace deltafox::app {

struct ScoreInput {
  std::int64_t rows = 0;                       // B
  std::int64_t columns = 0;                    // T
  std::vector<std::int32_t> input_ids{};       // [B, T]
  std::vector<std::uint8_t> attention_mask{};  // [B, T], empty where nothing is padding
  std::vector<std::int32_t> labels{};          // [B, T], empty for logits

  bool is_token(std::int64_t place) const {
    return attention_mask.empty() || attention_mask[static_cast<std::size_t>(place)] != 0;
  }
};

class ScoreInputOptions {
 public:
  void add(CLI::App& command, bool with_labels);

  // Ids outside of the model's vocabulary are an Error.
  ScoreInput read(const Model& model, const std::string& directory) const;

 private:
  ScoreInput read_file(const Model& model) const;
  ScoreInput read_sequence(const Model& model, const std::string& directory) const;

  bool with_labels_ = false;
  std::optional<std::string> file_;
  SequenceOptions sequence_;
};

// Hands out the input in groups of whole rows, so that only so many states are in memory. A group
// begins at row `first_row`; `states` are new ones.
void for_each_group(
    const ScoreInput& input, const Model& model,
    const std::function<void(std::int64_t first_row, const infer::PaddedBatch& batch,
                             std::span<State* const> states)>& visit);

}  // namespace deltafox::app
