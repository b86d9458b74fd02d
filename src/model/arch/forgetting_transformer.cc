#include "model/arch/forgetting_transformer.h"

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "model/arch/common.h"
#include "model/arch/transformer.h"

namespace deltafox::arch {
namespace {

ForgetGate forget_gate(const io::JsonObject& config) {
  const std::string name =
      config.choice("fgate_type", "full", {"full", "bias_only", "fixed", "none"});
  if (name == "full") return ForgetGate::kProjected;
  if (name == "bias_only") return ForgetGate::kBias;
  return name == "fixed" ? ForgetGate::kFixed : ForgetGate::kNone;
}

Init forget_gate_bias_init(const io::JsonObject& config, ForgetGate gate) {
  const bool given = config.boolean("fgate_bias_init", false);
  const auto min = config.optional_number("decay_time_min", std::nullopt, 1e-3, 1e12);
  const auto max = config.optional_number("decay_time_max", std::nullopt, 1e-3, 1e12);
  if (given && (gate == ForgetGate::kProjected || gate == ForgetGate::kNone)) {
    fail("{}: key 'fgate_bias_init': only for fgate_type bias_only and fixed", config.file());
  }
  if (!given && gate == ForgetGate::kFixed) {
    fail("{}: key 'fgate_bias_init': must be true for fgate_type fixed", config.file());
  }
  const auto check = [&](const char* key, bool present) {
    if (present == given) return;
    fail("{}: key '{}': {} with fgate_bias_init {}", config.file(), key,
         given ? "is needed" : "must be null", given);
  };
  check("decay_time_min", min.has_value());
  check("decay_time_max", max.has_value());
  return given ? Init::decay_times(*min, *max) : Init::constant(0);
}

QkNorm qk_norm_kind(const io::JsonObject& config) {
  const bool shared = config.boolean("qk_norm_share_param_across_head", false);
  if (!config.boolean("qk_norm", false)) return QkNorm::kNone;
  return shared ? QkNorm::kShared : QkNorm::kPerHead;
}

}  // namespace

CausalLM build_forgetting_transformer(const io::JsonObject& config) {
  AttentionMixer::Config mixer = attention_config(config, false);
  mixer.forget_gate = forget_gate(config);
  mixer.forget_gate_bias_init = forget_gate_bias_init(config, mixer.forget_gate);
  mixer.qk_norm = qk_norm_kind(config);
  mixer.use_k_shift = config.boolean("use_k_shift", false);
  mixer.use_v_shift = config.boolean("use_v_shift", false);
  mixer.use_output_gate = config.boolean("use_output_gate", false);
  mixer.use_output_norm = config.boolean("use_output_norm", false);
  const bool silu = config.choice("ogate_act", "sigmoid", {"sigmoid", "silu"}) == "silu";
  if (silu && mixer.use_output_gate && mixer.use_output_norm) {
    fail("{}: key 'ogate_act': must be sigmoid with use_output_norm", config.file());
  }
  mixer.output_gate_activation = silu ? Activation::kSilu : Activation::kSigmoid;
  if (const auto tolerance =
          config.optional_number("log_pruning_tolerance", std::nullopt, -1e4, 0)) {
    mixer.log_pruning_tolerance = static_cast<float>(*tolerance);
  }
  return build_attention_model(config, mixer, hidden_activation(config, "swish"));
}

std::string forgetting_transformer_config(FoxVariant variant, std::int64_t hidden_size,
                                          std::int64_t num_hidden_layers, std::int64_t num_heads) {
  const bool pro = variant != FoxVariant::kFoxLlama;
  const bool forget = variant != FoxVariant::kTransformerPro;
  const nlohmann::ordered_json config{
      {"architectures", {"ForgettingTransformerForCausalLM"}},
      {"model_type", "forgetting_transformer-project_fox"},
      {"vocab_size", 50257},
      {"hidden_size", hidden_size},
      {"hidden_ratio", pro ? 3.5 : 4.0},  // output gates have weights of their own
      {"intermediate_size", nullptr},
      {"num_hidden_layers", num_hidden_layers},
      {"num_heads", num_heads},
      {"num_kv_heads", nullptr},
      {"window_size", nullptr},
      {"max_position_embeddings", nullptr},
      {"hidden_act", "swish"},
      {"initializer_range", 0.02},
      {"elementwise_affine", true},
      {"norm_eps", 1e-6},
      {"use_cache", true},
      {"pad_token_id", nullptr},
      {"bos_token_id", 50256},
      {"eos_token_id", 50256},
      {"tie_word_embeddings", false},
      {"attention_bias", false},
      {"fuse_norm", true},
      {"fuse_cross_entropy", true},
      {"rope_base", 500000.0},
      {"use_rope", !forget},
      {"use_output_gate", pro},
      {"ogate_act", "sigmoid"},
      {"fgate_type", forget ? "full" : "none"},
      {"fgate_bias_init", false},
      {"decay_time_min", nullptr},
      {"decay_time_max", nullptr},
      {"use_output_norm", pro},
      {"qk_norm", pro},
      {"qk_norm_share_param_across_head", false},
      {"use_k_shift", pro},
      {"use_v_shift", pro},
      {"log_pruning_tolerance", nullptr},
      {"torch_dtype", "float32"},
  };
  return config.dump(2) + "\n";
}

}  // namespace deltafox::arch
