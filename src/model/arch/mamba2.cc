#include "model/arch/mamba2.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "model/arch/common.h"
#include "model/blocks/projection.h"

namespace deltafox::arch {
namespace {

Mamba2Mixer::Config mixer_config(const io::JsonObject& config, std::int64_t hidden_size,
                                 std::int64_t num_layers) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<double> limit = config.numbers("time_step_limit", 0, kInfinity);
  if (limit.empty()) limit = {0, kInfinity};
  if (limit.size() != 2 || limit[0] > limit[1]) {
    fail("{}: key 'time_step_limit': must be two numbers, the smaller first", config.file());
  }
  Mamba2Mixer::Config mixer{
      .hidden_size = hidden_size,
      .num_heads = config.integer("num_heads", 64, 1, kMaxWidth),
      .head_dim = config.integer("head_dim", 64, 1, kMaxWidth),
      .state_size = config.integer("state_size", 64, 1, kMaxStateSize),
      .num_groups = config.integer("n_groups", 8, 1, kMaxStateSize),
      .conv_size = config.integer("conv_kernel", 4, 1, 64),
      .use_bias = config.boolean("use_bias", false),
      .use_conv_bias = config.boolean("use_conv_bias", true),
      .conv_activation = hidden_activation(config, "silu"),
      .dt_min = static_cast<float>(limit[0]),
      .dt_max = static_cast<float>(limit[1]),
      .norm_eps = static_cast<float>(config.number("layer_norm_epsilon", 1e-5, 0, 1)),
      .dt_bias_init = time_step_bias_init(config),
      .out_init = {},
  };
  const double inner = static_cast<double>(hidden_size) * config.number("expand", 2, 1e-6, 1024);
  if (mixer.inner() != static_cast<std::int64_t>(inner) || mixer.inner() > kMaxWidth) {
    fail("{}: key 'num_heads': {} heads of head_dim {} do not make hidden_size {} times expand",
         config.file(), mixer.num_heads, mixer.head_dim, hidden_size);
  }
  if (mixer.num_groups * mixer.state_size > kMaxWidth) {
    fail("{}: key 'state_size': {} groups of {} are more than {} in all", config.file(),
         mixer.num_groups, mixer.state_size, kMaxWidth);
  }
  if (mixer.num_heads % mixer.num_groups != 0) {
    fail("{}: key 'n_groups': num_heads {} does not fall into {} whole groups", config.file(),
         mixer.num_heads, mixer.num_groups);
  }
  mixer.out_init = default_init(mixer.inner());
  if (config.boolean("rescale_prenorm_residual", true)) {
    mixer.out_init.value /= std::sqrt(static_cast<double>(num_layers));
  }
  return mixer;
}

}  // namespace

CausalLM build_mamba2(const io::JsonObject& config) {
  const std::int64_t hidden_size = config.integer("hidden_size", 2048, 1, kMaxWidth);
  const std::int64_t num_layers = config.integer("num_hidden_layers", 48, 1, kMaxLayers);
  const Mamba2Mixer::Config mixer = mixer_config(config, hidden_size, num_layers);
  // The residual stream is float32 always, and how long a chunk is makes no difference. The
  // official mixer has its norm whatever rms_norm says, and no use for time_step_rank.
  config.boolean("residual_in_fp32", true);
  config.boolean("rms_norm", true);
  config.integer("chunk_size", 256, 1, kMaxWidth);
  config.integer_or("time_step_rank", "auto", 1, kMaxWidth);

  std::vector<Layer> layers;
  for (std::int64_t l = 0; l < num_layers; ++l) {
    layers.push_back({.mixer_norm = Param::vector({hidden_size}, Init::constant(1)),
                      .mixer = Mamba2Mixer(mixer),
                      .mlp_norm = {},
                      .mlp = {}});
  }
  ParamNames names;
  names.embeddings = "backbone.embeddings.weight";
  names.layers = "backbone.layers.";
  names.mixer = "mixer.";
  names.mixer_norm = "norm.weight";
  names.norm = "backbone.norm_f.weight";
  return CausalLM({.vocab_size = config.integer("vocab_size", 32000, 1, kMaxVocab),
                   .hidden_size = hidden_size,
                   .norm_eps = mixer.norm_eps,
                   .embedding_init = Init::normal(config.number("initializer_range", 0.1, 0, 100)),
                   .lm_head_init = default_init(hidden_size),
                   .tie_word_embeddings = config.boolean("tie_word_embeddings", false),
                   .names = names},
                  std::move(layers));
}

std::string mamba2_config(std::int64_t hidden_size, std::int64_t num_hidden_layers,
                          std::int64_t num_heads) {
  // JSON has no word for infinity: time_step_limit is left to its default, from 0 to infinity.
  const nlohmann::ordered_json config{
      {"architectures", {"Mamba2ForCausalLM"}},
      {"model_type", "mamba2-project_fox"},
      {"vocab_size", 50257},
      {"hidden_size", hidden_size},
      {"num_hidden_layers", num_hidden_layers},
      {"num_heads", num_heads},
      {"head_dim", 64},
      {"state_size", 128},
      {"expand", 2},
      {"conv_kernel", 4},
      {"n_groups", 1},
      {"use_bias", false},
      {"use_conv_bias", true},
      {"hidden_act", "silu"},
      {"layer_norm_epsilon", 1e-5},
      {"residual_in_fp32", true},
      {"time_step_rank", "auto"},
      {"time_step_min", 0.001},
      {"time_step_max", 0.1},
      {"time_step_floor", 1e-4},
      {"rescale_prenorm_residual", true},
      {"rms_norm", true},
      {"chunk_size", 256},
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
