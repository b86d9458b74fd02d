#include "model/arch/delta_net.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "model/arch/common.h"

namespace deltafox::arch {
namespace {

Activation qk_activation(const io::JsonObject& config) {
  const std::string name =
      config.choice("qk_activation", "silu", {"silu", "relu", "elu", "identity"});
  if (name == "relu") return Activation::kRelu;
  if (name == "elu") return Activation::kEluPlusOne;
  return name == "silu" ? Activation::kSilu : Activation::kIdentity;
}

FeatureNorm qk_norm(const io::JsonObject& config) {
  const std::string name = config.choice("qk_norm", "l2", {"l2", "sum"});
  return name == "l2" ? FeatureNorm::kL2 : FeatureNorm::kSum;
}

// hidden_size · factor, which must fall into `heads` whole heads.
std::int64_t expanded(const io::JsonObject& config, const char* key, std::int64_t hidden_size,
                      std::int64_t heads) {
  const double factor = config.number(key, 1, 1e-6, 1024);
  const auto width = static_cast<std::int64_t>(static_cast<double>(hidden_size) * factor);
  if (width < 1 || width > kMaxWidth || width % heads != 0) {
    fail("{}: key '{}': hidden_size {} times {} must be a multiple of num_heads {}", config.file(),
         key, hidden_size, factor, heads);
  }
  return width;
}

}  // namespace

CausalLM build_delta_net(const io::JsonObject& config) {
  const std::int64_t hidden_size = config.integer("hidden_size", 2048, 1, kMaxWidth);
  const std::int64_t num_layers = config.integer("num_hidden_layers", 24, 1, kMaxLayers);
  const std::int64_t num_heads = config.integer("num_heads", 16, 1, kMaxWidth);
  const auto norm_eps = static_cast<float>(config.number("norm_eps", 1e-6, 0, 1));
  const bool norm_first = config.boolean("norm_first", false);
  const double std = config.number("initializer_range", 0.02, 0, 100);
  // Every mode computes the same; and use_output_norm is read but never used by the official layer.
  config.choice("attn_mode", "chunk", {"chunk", "fused_chunk", "fused_recurrent"});

  const DeltaNetMixer::Config mixer{
      .hidden_size = hidden_size,
      .num_heads = num_heads,
      .key_dim = expanded(config, "expand_k", hidden_size, num_heads),
      .value_dim = expanded(config, "expand_v", hidden_size, num_heads),
      .conv_size = config.integer("conv_size", 4, 1, 64),
      .use_gate = config.boolean("use_gate", false),
      .use_short_conv = config.boolean("use_short_conv", true),
      .use_beta = config.boolean("use_beta", true),
      .qk_activation = qk_activation(config),
      .qk_norm = qk_norm(config),
      .norm_first = norm_first,
      .norm_eps = norm_eps,
  };
  const Mlp::Config mlp{
      .hidden_size = hidden_size,
      .intermediate_size = intermediate_size(config, hidden_size, 4),
      .activation = hidden_activation(config, "swish"),
      .norm_first = norm_first,
      .norm_eps = norm_eps,
      .gate_init = Init::normal(std),
      .down_init = Init::normal(std / std::sqrt(2 * static_cast<double>(num_layers))),
  };

  std::vector<Layer> layers;
  for (std::int64_t l = 0; l < num_layers; ++l) {
    Layer layer{.mixer_norm = {}, .mixer = DeltaNetMixer(mixer), .mlp_norm = {}, .mlp = Mlp(mlp)};
    if (!norm_first) {
      layer.mixer_norm = Param::vector({hidden_size}, Init::constant(1));
      layer.mlp_norm = Param::vector({hidden_size}, Init::constant(1));
    }
    layers.push_back(std::move(layer));
  }
  return CausalLM({.vocab_size = config.integer("vocab_size", 32000, 1, kMaxVocab),
                   .hidden_size = hidden_size,
                   .norm_eps = norm_eps,
                   .embedding_init = Init::normal(std),
                   .tie_word_embeddings = config.boolean("tie_word_embeddings", false),
                   .names = {}},
                  std::move(layers));
}

std::string delta_net_config(std::int64_t hidden_size, std::int64_t num_hidden_layers,
                             std::int64_t num_heads) {
  const nlohmann::ordered_json config{
      {"architectures", {"DeltaNetForCausalLM"}},
      {"model_type", "delta_net-project_fox"},
      {"vocab_size", 50257},
      {"hidden_size", hidden_size},
      {"num_hidden_layers", num_hidden_layers},
      {"num_heads", num_heads},
      {"expand_k", 1},
      {"expand_v", 1},
      {"use_gate", false},
      {"use_short_conv", true},
      {"conv_size", 4},
      {"use_beta", true},
      {"use_output_norm", true},
      {"hidden_ratio", 4},
      {"intermediate_size", nullptr},
      {"attn_mode", "chunk"},
      {"qk_norm", "l2"},
      {"qk_activation", "silu"},
      {"hidden_act", "swish"},
      {"max_position_embeddings", nullptr},
      {"norm_first", false},
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
