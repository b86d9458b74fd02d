#include "model/arch/samba.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "model/arch/common.h"
#include "model/blocks/projection.h"

namespace deltafox::arch {
namespace {

struct Sizes {
  std::int64_t hidden_size;
  std::int64_t num_layers;
  // What the official initialiser divides the last projections of mixers and
  // MLPs by.
  double residual_scale;

  Init residual_init(std::int64_t fan_in) const {
    Init init = default_init(fan_in);
    init.value /= residual_scale;
    return init;
  }
};

MambaMixer::Config mamba_config(const io::JsonObject& config, const Sizes& sizes) {
  const std::int64_t hidden_size = sizes.hidden_size;
  const auto inner = static_cast<std::int64_t>(static_cast<double>(hidden_size) *
                                               config.number("expand", 2, 1e-6, 1024));
  if (inner < 1 || inner > kMaxWidth) {
    fail("{}: key 'expand': hidden_size {} times expand must be from 1 to {}", config.file(),
         hidden_size, kMaxWidth);
  }
  MambaMixer::Config mixer{
      .hidden_size = hidden_size,
      .inner_size = inner,
      .state_size = config.integer("state_size", 16, 1, kMaxStateSize),
      .dt_rank = config.integer_or("time_step_rank", "auto", 1, kMaxWidth)
                     .value_or((hidden_size + 15) / 16),
      .conv_size = config.integer("conv_kernel", 4, 1, 64),
      .use_bias = config.boolean("use_bias", false),
      .use_conv_bias = config.boolean("use_conv_bias", true),
      .dt_init = {},
      .dt_bias_init = time_step_bias_init(config),
      .out_init = sizes.residual_init(inner),
  };
  const double dt_std =
      config.number("time_step_scale", 1, 0, 1e6) / std::sqrt(static_cast<double>(mixer.dt_rank));
  const bool constant =
      config.choice("time_step_init_scheme", "random", {"random", "constant"}) == "constant";
  mixer.dt_init = constant ? Init::constant(dt_std) : Init::uniform(dt_std);
  return mixer;
}

// The attention layers, and what they are like.
struct Attention {
  std::vector<bool> layers;  // [L]
  AttentionMixer::Config mixer;
};

std::optional<Attention> read_attention(const io::JsonObject& config, const Sizes& sizes) {
  const auto rope_base = static_cast<float>(config.number("rope_base", 500000, 1, 1e12));
  const std::optional<io::JsonObject> attn = config.object("attn");
  if (!attn) return std::nullopt;
  for (const char* key : {"layers", "num_heads"}) {
    if (!attn->contains(key)) fail("{}: key 'attn.{}': is missing", config.file(), key);
  }
  Attention attention{.layers = std::vector<bool>(static_cast<std::size_t>(sizes.num_layers)),
                      .mixer = {}};
  if (attn->has_value("layers")) {
    for (const std::int64_t l : attn->integers("layers", 0, sizes.num_layers - 1)) {
      attention.layers[static_cast<std::size_t>(l)] = true;
    }
  } else {
    for (std::size_t l = 1; l < attention.layers.size(); l += 2) attention.layers[l] = true;
  }
  const std::int64_t hidden_size = sizes.hidden_size;
  const std::int64_t heads = attn->integer("num_heads", 0, 1, hidden_size);
  const std::int64_t kv_heads =
      attn->optional_integer("num_kv_heads", heads, 1, heads).value_or(heads);
  if (hidden_size % (2 * heads) != 0) {
    fail("{}: key 'attn.num_heads': hidden_size {} does not fall into {} heads of even size",
         config.file(), hidden_size, heads);
  }
  if (heads % kv_heads != 0) {
    fail("{}: key 'attn.num_kv_heads': {} does not divide num_heads {}", config.file(), kv_heads,
         heads);
  }
  attention.mixer = {
      .hidden_size = hidden_size,
      .num_heads = heads,
      .num_kv_heads = kv_heads,
      .head_dim = hidden_size / heads,
      .window_size = attn->optional_integer("window_size", std::nullopt, 1, kMaxPosition),
      .use_rope = true,
      .rope_base = rope_base,
      .projection_init = default_init(hidden_size),
      .o_init = sizes.residual_init(hidden_size),
  };
  return attention;
}

}  // namespace

CausalLM build_samba(const io::JsonObject& config) {
  Sizes sizes{.hidden_size = config.integer("hidden_size", 2304, 1, kMaxWidth),
              .num_layers = config.integer("num_hidden_layers", 18, 1, kMaxLayers),
              .residual_scale = 1};
  if (config.boolean("rescale_prenorm_residual", false)) {
    sizes.residual_scale = std::sqrt(2 * static_cast<double>(sizes.num_layers));
  }
  const auto norm_eps = static_cast<float>(config.number("norm_eps", 1e-5, 0, 1));
  const double std = config.number("initializer_range", 0.02, 0, 100);
  // The convolution, Mamba's gate and the MLPs have SiLU by one of its names; the residual stream
  // is float32 always; and the longest position only sizes a table.
  config.choice("hidden_act", "silu", {"silu", "swish"});
  config.boolean("residual_in_fp32", false);
  config.optional_integer("max_position_embeddings", 2048, 1, kMaxPosition);
  const MambaMixer::Config mamba = mamba_config(config, sizes);
  const std::optional<Attention> attention = read_attention(config, sizes);
  const auto mlp = [&](const char* ratio_key, double default_ratio) {
    const std::int64_t width =
        hidden_ratio_size(config, ratio_key, sizes.hidden_size, default_ratio);
    return Mlp::Config{.hidden_size = sizes.hidden_size,
                       .intermediate_size = width,
                       .activation = Activation::kSilu,
                       .norm_first = false,
                       .norm_eps = norm_eps,
                       .gate_init = default_init(sizes.hidden_size),
                       .down_init = sizes.residual_init(width)};
  };
  const Mlp::Config mamba_mlp = mlp("mamba_hidden_ratio", 3);
  const Mlp::Config attention_mlp = mlp("attn_hidden_ratio", 4);

  std::vector<Layer> layers;
  for (std::int64_t l = 0; l < sizes.num_layers; ++l) {
    const bool attends = attention && attention->layers[static_cast<std::size_t>(l)];
    layers.push_back(
        {.mixer_norm = Param::vector({sizes.hidden_size}, Init::constant(1)),
         .mixer = attends ? Mixer(AttentionMixer(attention->mixer)) : Mixer(MambaMixer(mamba)),
         .mlp_norm = Param::vector({sizes.hidden_size}, Init::constant(1)),
         .mlp = Mlp(attends ? attention_mlp : mamba_mlp)});
  }
  ParamNames names;
  names.embeddings = "backbone.embeddings.weight";
  names.layers = "backbone.layers.";
  names.mixer = "mixer.";
  names.mixer_norm = "mixer_norm.weight";
  names.norm = "backbone.norm_f.weight";
  return CausalLM({.vocab_size = config.integer("vocab_size", 32000, 1, kMaxVocab),
                   .hidden_size = sizes.hidden_size,
                   .norm_eps = norm_eps,
                   .embedding_init = Init::normal(std),
                   .lm_head_init = default_init(sizes.hidden_size),
                   .tie_word_embeddings = config.boolean("tie_word_embeddings", false),
                   .names = names},
                  std::move(layers));
}

std::string samba_config() {
  const nlohmann::ordered_json config{
      {"architectures", {"SambaForCausalLM"}},
      {"model_type", "samba-project_fox"},
      {"vocab_size", 50257},
      {"hidden_size", 1536},
      {"num_hidden_layers", 24},
      {"state_size", 16},
      {"expand", 2},
      {"conv_kernel", 4},
      {"use_bias", false},
      {"use_conv_bias", true},
      {"hidden_act", "silu"},
      {"norm_eps", 1e-5},
      {"attn",
       {{"layers", nullptr}, {"num_heads", 12}, {"num_kv_heads", nullptr}, {"window_size", 2048}}},
      {"attn_hidden_ratio", 4},
      {"mamba_hidden_ratio", 3},
      {"rope_base", 500000.0},
      {"max_position_embeddings", nullptr},
      {"residual_in_fp32", false},
      {"time_step_rank", "auto"},
      {"time_step_scale", 1.0},
      {"time_step_min", 0.001},
      {"time_step_max", 0.1},
      {"time_step_floor", 1e-4},
      {"time_step_init_scheme", "random"},
      {"rescale_prenorm_residual", true},
      {"use_cache", true},
      {"pad_token_id", nullptr},
      {"bos_token_id", 50256},
      {"eos_token_id", 50256},
      {"tie_word_embeddings", false},
      {"initializer_range", 0.02},
      {"fuse_norm", true},
      {"fuse_cross_entropy", true},
      {"torch_dtype", "float32"},
  };
  return config.dump(2) + "\n";
}

}  // namespace deltafox::arch
