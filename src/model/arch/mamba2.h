// model_type mamba2-project_fox: the official Mamba2ForCausalLM and every option of Mamba2Config.
#pragma once

#include <cstdint>
#include <string>

#include "io/json.h"
#include "model/causal_lm.h"

namespace deltafox::arch {

CausalLM build_mamba2(const io::JsonObject& config);

// The paper's config.json for a size.
std::string mamba2_config(std::int64_t hidden_size, std::int64_t num_hidden_layers,
                          std::int64_t num_heads);

}  // namespace deltafox::arch
