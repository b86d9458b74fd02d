// model_type forgetting_transformer-project_fox: the official ForgettingTransformerForCausalLM and
// every option of ForgettingTransformerConfig. FoX-Pro, FoX-LLaMA and Transformer-Pro are this
// class.
#pragma once

#include <cstdint>
#include <string>

#include "io/json.h"
#include "model/causal_lm.h"

namespace deltafox::arch {

CausalLM build_forgetting_transformer(const io::JsonObject& config);

enum class FoxVariant : std::uint8_t { kFoxPro, kFoxLlama, kTransformerPro };

// The paper's config.json for a size.
std::string forgetting_transformer_config(FoxVariant variant, std::int64_t hidden_size,
                                          std::int64_t num_hidden_layers, std::int64_t num_heads);

}  // namespace deltafox::arch
