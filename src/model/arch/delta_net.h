// model_type delta_net-project_fox: the official DeltaNetForCausalLM and every option of
// DeltaNetConfig.
#pragma once

#include <cstdint>
#include <string>

#include "io/json.h"
#include "model/causal_lm.h"

namespace deltafox::arch {

CausalLM build_delta_net(const io::JsonObject& config);

// The paper's config.json for a size.
std::string delta_net_config(std::int64_t hidden_size, std::int64_t num_hidden_layers,
                             std::int64_t num_heads);

}  // namespace deltafox::arch
