// model_type hgrn2-project_fox: the official HGRN2ForCausalLM and every option of HGRN2Config.
#pragma once

#include <cstdint>
#include <string>

#include "io/json.h"
#include "model/causal_lm.h"

namespace deltafox::arch {

CausalLM build_hgrn2(const io::JsonObject& config);

// The paper's config.json for a size.
std::string hgrn2_config(std::int64_t hidden_size, std::int64_t num_hidden_layers);

}  // namespace deltafox::arch
