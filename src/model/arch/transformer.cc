#include "model/arch/transformer.h"

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "model/arch/common.h"

namespace deltafox::arch {
namespace {

Init projection_init(const io::JsonObject& config) {
  return Init::normal(config.number("initializer_range", 0.02, 0, 100));
}

}  // namespace

AttentionMixer::Config attention_config(const io::JsonObject& config, bool default_use_rope) {
  const std::int64_t hidden_size = config.integer("hidden_size", 2048, 1, kMaxWidth);
  const std::int64_t num_heads = config.integer("num_heads", 32, 1, kMaxWidth);
  if (hidden_size % num_heads != 0) {
    fail("{}: key 'num_heads': hidden_size {} is not a multiple of {}", config.file(), hidden_size,
         num_heads);
  }
  const std::int64_t num_kv_heads =
      config.optional_integer("num_kv_heads", std::nullopt, 1, kMaxWidth).value_or(num_heads);
  if (num_heads % num_kv_heads != 0) {
    fail("{}: key 'num_kv_heads': num_heads {} is not a multiple of {}", config.file(), num_heads,
         num_kv_heads);
  }
  const bool use_rope = config.boolean("use_rope", default_use_rope);
  if (use_rope && hidden_size / num_heads % 2 != 0) {
    fail("{}: key 'use_rope': needs an even head size, got {}", config.file(),
         hidden_size / num_heads);
  }
  // The official classes read these, but their layers never use them (the longest position only
  // sizes a table).
  config.boolean("attention_bias", false);
  config.boolean("elementwise_affine", true);
  config.optional_integer("max_position_embeddings", 2048, 1, kMaxPosition);
  return {
      .hidden_size = hidden_size,
      .num_heads = num_heads,
      .num_kv_heads = num_kv_heads,
      .head_dim = hidden_size / num_heads,
      .window_size = config.optional_integer("window_size", std::nullopt, 1, kMaxPosition),
      .use_rope = use_rope,
      .rope_base = static_cast<float>(config.number("rope_base", 500000, 1, 1e30)),
      .norm_eps = static_cast<float>(config.number("norm_eps", 1e-6, 0, 1)),
      .projection_init = projection_init(config),
  };
}

CausalLM build_attention_model(const io::JsonObject& config, const AttentionMixer::Config& mixer,
                               Activation mlp_activation) {
  const std::int64_t hidden_size = mixer.hidden_size;
  const std::int64_t num_layers = config.integer("num_hidden_layers", 24, 1, kMaxLayers);
  const Mlp::Config mlp{
      .hidden_size = hidden_size,
      .intermediate_size = intermediate_size(config, hidden_size, 4),
      .activation = mlp_activation,
      .gate_init = projection_init(config),
      .down_init = projection_init(config),
  };
  std::vector<Layer> layers;
  for (std::int64_t l = 0; l < num_layers; ++l) {
    layers.push_back({.mixer_norm = Param::vector({hidden_size}, Init::constant(1)),
                      .mixer = AttentionMixer(mixer),
                      .mlp_norm = Param::vector({hidden_size}, Init::constant(1)),
                      .mlp = Mlp(mlp)});
  }
  return CausalLM({.vocab_size = config.integer("vocab_size", 32000, 1, kMaxVocab),
                   .hidden_size = hidden_size,
                   .norm_eps = mixer.norm_eps,
                   .embedding_init = projection_init(config),
                   .tie_word_embeddings = config.boolean("tie_word_embeddings", false),
                   .names = {}},
                  std::move(layers));
}

CausalLM build_transformer(const io::JsonObject& config) {
  // The official MLP of this class is SwiGLU whatever hidden_act says.
  config.choice("hidden_act", "swish", {"swish", "silu"});
  return build_attention_model(config, attention_config(config, true), Activation::kSilu);
}

std::string transformer_config(std::int64_t hidden_size, std::int64_t num_hidden_layers,
                               std::int64_t num_heads) {
  const nlohmann::ordered_json config{
      {"architectures", {"TransformerForCausalLM"}},
      {"model_type", "transformer-project_fox"},
      {"vocab_size", 50257},
      {"hidden_size", hidden_size},
      {"hidden_ratio", 4},
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
      {"use_rope", true},
      {"torch_dtype", "float32"},
  };
  return config.dump(2) + "\n";
}

}  // namespace deltafox::arch
