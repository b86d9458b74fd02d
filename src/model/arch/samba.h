// model_type samba-project_fox: the official SambaForCausalLM and every option
// of SambaConfig.
#pragma once

#include <string>

#include "io/json.h"
#include "model/causal_lm.h"

namespace deltafox::arch {

// Layers of Mamba, and (every second one, or those that attn.layers lists) of
// sliding-window attention.
CausalLM build_samba(const io::JsonObject& config);

// The paper's config.json, of 760M parameters.
std::string samba_config();

}  // namespace deltafox::arch
