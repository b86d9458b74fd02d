// model_type transformer-project_fox: the official TransformerForCausalLM and every option of
// TransformerConfig.
#pragma once

#include <cstdint>
#include <string>

#include "io/json.h"
#include "model/causal_lm.h"

namespace deltafox::arch {

CausalLM build_transformer(const io::JsonObject& config);

// What the official configuration classes with attention layers have in common: the sizes, heads,
// window and rotary embedding.
AttentionMixer::Config attention_config(const io::JsonObject& config, bool default_use_rope);

// A model of attention layers, each followed by an MLP, with pre-norm residuals.
CausalLM build_attention_model(const io::JsonObject& config, const AttentionMixer::Config& mixer,
                               Activation mlp_activation);

// The config.json of the paper's Transformer (LLaMA) for a size.
std::string transformer_config(std::int64_t hidden_size, std::int64_t num_hidden_layers,
                               std::int64_t num_heads);

}  // namespace deltafox::arch
