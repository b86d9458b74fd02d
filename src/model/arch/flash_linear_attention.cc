#include "model/arch/flash_linear_attention.h"

#include "core/error.h"
#include "model/arch/common.h"
#include "model/arch/delta_net.h"
#include "model/arch/transformer.h"

namespace deltafox::arch {
namespace {

void require_absent(const io::JsonObject& config, const char* key, bool present,
                    const char* reason) {
  if (present) fail("{}: key '{}': must be null: {}", config.file(), key, reason);
}

bool has_number(const io::JsonObject& config, const char* key) {
  return config.optional_integer(key, std::nullopt, 0, kMaxPosition).has_value();
}

void require_false(const io::JsonObject& config, const char* key, const char* reason) {
  if (config.boolean(key, false)) {
    fail("{}: key '{}': must be false: {}", config.file(), key, reason);
  }
}

// What newer versions know and none of ours does.
void require_common(const io::JsonObject& config) {
  require_absent(config, "attnres_block_size", has_number(config, "attnres_block_size"),
                 "attention over residuals is not supported");
  config.choice("hidden_act", "swish", {"swish"});
}

}  // namespace

CausalLM build_fla_delta_net(const io::JsonObject& config) {
  require_common(config);
  require_absent(config, "attn", config.object("attn").has_value(),
                 "hybrids with attention layers are not supported");
  require_false(config, "allow_neg_eigval", "gates beyond one are not supported");
  const bool silu = config.string("qk_activation", "silu") == "silu";
  if (silu && !config.boolean("use_short_conv", true)) {
    fail("{}: key 'use_short_conv': must be true with qk_activation silu", config.file());
  }
  return build_delta_net(config);
}

CausalLM build_fla_forgetting_transformer(const io::JsonObject& config) {
  require_common(config);
  require_absent(config, "window_size", has_number(config, "window_size"),
                 "flash-linear-attention applies it when it decodes only");
  require_false(config, "qkv_bias", "biases of q, k and v are not supported");
  AttentionMixer::Config mixer = attention_config(config, false);
  mixer.use_rope = false;
  mixer.forget_gate = ForgetGate::kProjected;
  mixer.qk_norm = config.boolean("qk_norm", false) ? QkNorm::kPerHead : QkNorm::kNone;
  mixer.use_output_gate = config.boolean("use_output_gate", false);
  mixer.forget_gate_name = "f_proj";
  mixer.output_gate_name = "g_proj";
  return build_attention_model(config, mixer, Activation::kSilu);
}

}  // namespace deltafox::arch
