// Metrics as JSON lines under RUN/metrics/jsonlines, in the files and with the names of the
// official script: train, throughput, norm, train_eval, val. Losses by position go into safetensors
// files under RUN/metrics/arrays.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>

namespace deltafox::train {

class Metrics {
 public:
  // Drops what was logged after `resume_tokens`: it is going to be logged again.
  Metrics(const std::string& run_directory, std::int64_t resume_tokens);

  // Appends {"step": tokens, ...} to `<name>.jsonl`.
  void log(const std::string& name, std::int64_t tokens,
           const nlohmann::ordered_json& values) const;
  // Writes loss_per_token [T] to arrays/<name>/step-<tokens>.safetensors.
  void log_losses(const std::string& name, std::int64_t tokens,
                  std::span<const float> losses) const;

 private:
  std::string lines_directory_;
  std::string arrays_directory_;
};

}  // namespace deltafox::train
