#include "model/arch/hgrn2.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "model/arch/common.h"

namespace deltafox::arch {
namespace {

// Sets num_heads and expand_ratio, either of which follows from the other.
void read_heads(const io::JsonObject& config, Hgrn2Mixer::Config& mixer) {
  const std::int64_t hidden_size = mixer.hidden_size;
  const auto heads = config.optional_integer("num_heads", std::nullopt, 1, hidden_size);
  const auto ratio = config.optional_integer("expand_ratio", 128, 1, kMaxWidth);
  if (!heads && !ratio) {
    fail("{}: key 'expand_ratio': must be given where num_heads is not", config.file());
  }
  mixer.num_heads = heads.value_or(hidden_size / ratio.value_or(1));
  if (mixer.num_heads < 1 || hidden_size % mixer.num_heads != 0) {
    fail("{}: key '{}': hidden_size {} does not fall into {} whole heads", config.file(),
         heads ? "num_heads" : "expand_ratio", hidden_size, mixer.num_heads);
  }
  mixer.expand_ratio = ratio.value_or(hidden_size / mixer.num_heads);
  if (mixer.num_heads * mixer.expand_ratio > kMaxWidth) {
    fail("{}: key 'expand_ratio': {} heads of {} are more than {} in all", config.file(),
         mixer.num_heads, mixer.expand_ratio, kMaxWidth);
  }
}

}  // namespace

CausalLM build_hgrn2(const io::JsonObject& config) {
  const std::int64_t hidden_size = config.integer("hidden_size", 2048, 1, kMaxWidth);
  const std::int64_t num_layers = config.integer("num_hidden_layers", 24, 1, kMaxLayers);
  const auto norm_eps = static_cast<float>(config.number("norm_eps", 1e-6, 0, 1));
  const double std = config.number("initializer_range", 0.02, 0, 100);
  // Every mode computes the same; and the official MLP is SwiGLU whatever the name of SiLU is.
  config.choice("attn_mode", "chunk", {"chunk", "fused_chunk", "fused_recurrent"});
  config.choice("hidden_act", "swish", {"swish", "silu"});

  Hgrn2Mixer::Config mixer{
      .hidden_size = hidden_size,
      .num_heads = 0,
      .expand_ratio = 0,
      .conv_size = config.integer("conv_size", 4, 1, 64),
      .use_short_conv = config.boolean("use_short_conv", false),
      .elementwise_affine = config.boolean("elementwise_affine", true),
      .norm_eps = norm_eps,
  };
  read_heads(config, mixer);
  const Mlp::Config mlp{
      .hidden_size = hidden_size,
      .intermediate_size = intermediate_size(config, hidden_size, 4),
      .activation = Activation::kSilu,
      .norm_first = false,
      .norm_eps = norm_eps,
      .gate_init = Init::normal(std),
      .down_init = Init::normal(std / std::sqrt(2 * static_cast<double>(num_layers))),
  };

  std::vector<Layer> layers;
  for (std::int64_t l = 0; l < num_layers; ++l) {
    layers.push_back({.mixer_norm = Param::vector({hidden_size}, Init::constant(1)),
                      .mixer = Hgrn2Mixer(mixer),
                      .mlp_norm = Param::vector({hidden_size}, Init::constant(1)),
                      .mlp = Mlp(mlp)});
  }
  // HGRN2's lower bounds of the forget gates are in the official checkpoints, but the official
  // block drops them on the way to its mixer: they were neither trained nor used.
  std::vector<IdleParam> idle;
  if (config.boolean("use_lower_bound", true)) {
    idle.push_back({.name = "model.lower_bounds",
                    .param = Param::vector({num_layers, hidden_size}, Init::constant(0))});
  }
  return CausalLM({.vocab_size = config.integer("vocab_size", 32000, 1, kMaxVocab),
                   .hidden_size = hidden_size,
                   .norm_eps = norm_eps,
                   .embedding_init = Init::normal(std),
                   .tie_word_embeddings = config.boolean("tie_word_embeddings", false),
                   .names = {}},
                  std::move(layers), std::move(idle));
}

std::string hgrn2_config(std::int64_t hidden_size, std::int64_t num_hidden_layers) {
  const nlohmann::ordered_json config{
      {"architectures", {"HGRN2ForCausalLM"}},
      {"model_type", "hgrn2-project_fox"},
      {"vocab_size", 50257},
      {"hidden_size", hidden_size},
      {"num_hidden_layers", num_hidden_layers},
      {"attn_mode", "chunk"},
      {"num_heads", nullptr},
      {"expand_ratio", 128},
      {"use_short_conv", false},
      {"conv_size", 4},
      {"use_lower_bound", true},
      {"hidden_ratio", 4},
      {"intermediate_size", nullptr},
      {"hidden_act", "swish"},
      {"max_position_embeddings", nullptr},
      {"elementwise_affine", true},
      {"norm_eps", 1e-6},
      {"use_cache", true},
      {"pad_token_id", nullptr},
      {"bos_token_id", 50256},
      {"eos_token_id", 50256},
      {"tie_word_embeddings", false},
      {"initializer_range", 0.02},
      {"fuse_cross_entropy", true},
      {"torch_dtype", "float32"},
  };
  return config.dump(2) + "\n";
}

}  // namespace deltafox::arch
