// A sequence's state in a file.
#pragma once

#include <string>

#include "model/causal_lm.h"

namespace deltafox {

// A safetensors file: tensors "layers.<l>.<name>"; metadata "format" = "deltafox-state",
// "version" = "1", "model" = the hash of the model's weights, "position" = tokens read.
void write_state(SequenceState& state, const std::string& model_hash, const std::string& path);

// Fills `state`, a new state of the model with this hash. Throws Error naming the file and what
// does not fit.
void read_state(const std::string& path, const std::string& model_hash, SequenceState& state);

}  // namespace deltafox
