// Randomly initialised checkpoints.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "deltafox/dtype.h"
#include "model/param.h"

namespace deltafox {

struct InitOptions {
  std::uint64_t seed = 0;
  DType dtype = DType::kF32;
  int threads = 0;
  // Bytes written so far and in all; may be empty.
  std::function<void(std::int64_t done, std::int64_t total)> on_progress;
};

// The elements of a parameter from `begin` on as the official code initialises them; `index` is the
// parameter's place in visit_params. `begin` and the size of `to` are multiples of four, or the
// parameter ends there.
void initial_values(const Param& param, std::uint64_t seed, std::uint32_t index, std::int64_t begin,
                    std::span<float> to);

// Writes config.json and model.safetensors into `directory` (made if it does not exist; Error if it
// holds a config.json or model.safetensors already): the model that the text `config_json`
// describes, initialised as the official code does, from a counter-based generator: the same seed
// gives the same file on any machine. The written config marks the weights as random.
void write_initialised(const std::string& config_json, const std::string& directory,
                       const InitOptions& options);

}  // namespace deltafox
