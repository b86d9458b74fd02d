// The model types of flash-linear-attention that compute what official ones do: delta_net and
// forgetting_transformer. Options that mean something else there are refused by name.
#pragma once

#include "io/json.h"
#include "model/causal_lm.h"

namespace deltafox::arch {

CausalLM build_fla_delta_net(const io::JsonObject& config);
CausalLM build_fla_forgetting_transformer(const io::JsonObject& config);

}  // namespace deltafox::arch
