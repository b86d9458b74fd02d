// Checkpoints with weights of fewer bits. docs/quantization.md describes the files.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "deltafox/dtype.h"
#include "io/json.h"

namespace deltafox {

struct QuantizeOptions {
  DType dtype = DType::kQ8;  // kBF16, kQ8 or kQ4
  int threads = 0;
  // Bytes written so far and in all; may be empty.
  std::function<void(std::int64_t done, std::int64_t total)> on_progress;
};

// Writes the checkpoint in the directory `from`, of float weights, to the directory `to` (made if
// it does not exist; Error if it holds a config.json or model.safetensors already), with its
// matrices kept as kept_dtype() says; its tokenizer and other small files are copied.
void write_quantized(const std::string& from, const std::string& to,
                     const QuantizeOptions& options);

// The packed form of the matrices that a config.json names, if any. Throws Error that names the
// file if they are quantised in a way that is not ours, or of another version.
std::optional<DType> quantization_of(const io::JsonObject& config);

// What a packed parameter's tensor is called in a file: its name and ".q8" or ".q4".
std::string packed_name(const std::string& name, DType dtype);

}  // namespace deltafox
