// From a config.json to a model without weights.
#pragma once

#include <string>
#include <vector>

#include "io/json.h"
#include "model/causal_lm.h"

namespace deltafox {

// The model that `config` describes, its parameters declared but not bound. Throws Error that names
// the file and key at fault, or the model types that are known.
CausalLM build_model(const io::JsonObject& config);

// The names that preset_config knows: delta_net-125m, ...
std::vector<std::string> preset_names();

// The text of the config.json of a named model of the paper. Throws Error that lists the names.
std::string preset_config(const std::string& name);

}  // namespace deltafox
