// Configurations of Mamba-2, HGRN2 and Samba: sizes, options, refusals, initial weights. The
// forward passes are golden_test's.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "deltafox/error.h"
#include "io/safetensors.h"
#include "model/init.h"
#include "model/registry.h"
#include "support/temporary.h"

namespace deltafox {
namespace {

using testing::HasSubstr;

CausalLM build(const std::string& text) {
  return build_model(io::JsonObject::parse(text, "config.json"));
}

std::map<std::string, Shape> shapes(const std::string& text) {
  std::map<std::string, Shape> result;
  build(text).visit_params(
      [&](const std::string& name, const Param& param) { result[name] = param.shape; });
  return result;
}

std::int64_t non_embedding_parameters(const std::string& preset) {
  CausalLM model = build(preset_config(preset));
  std::int64_t total = 0;
  model.visit_params([&](const std::string& name, const Param& param) {
    if (name != model.config().names.embeddings) total += param.shape.size();
  });
  return total;
}

std::string refusal(const std::string& text) {
  try {
    build(text);
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

std::string mamba2(const std::string& options) {
  return R"({"model_type": "mamba2-project_fox", "hidden_size": 32, "num_heads": 4, "head_dim": 16,
             "n_groups": 2, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 11)" +
         (options.empty() ? "" : ", " + options) + "}";
}

std::string hgrn2(const std::string& options) {
  return R"({"model_type": "hgrn2-project_fox", "hidden_size": 32, "num_hidden_layers": 2,
             "vocab_size": 11)" +
         (options.empty() ? "" : ", " + options) + "}";
}

std::string samba(const std::string& options) {
  return R"({"model_type": "samba-project_fox", "hidden_size": 32, "num_hidden_layers": 4,
             "vocab_size": 11)" +
         (options.empty() ? "" : ", " + options) + "}";
}

TEST(Architectures, ThePapersModelsHaveThePapersSizes) {
  // The paper counts all but the embedding, in millions rounded down.
  const auto millions = [](const char* preset) {
    return non_embedding_parameters(preset) / 1'000'000;
  };
  EXPECT_EQ(millions("delta_net-760m"), 757);
  EXPECT_EQ(millions("hgrn2-760m"), 756);
  EXPECT_EQ(millions("mamba2-760m"), 780);
}

TEST(Architectures, EveryPresetIsAModel) {
  for (const std::string& name : preset_names())
    EXPECT_GT(non_embedding_parameters(name), 100'000'000);
}

TEST(Mamba2Config, BiasesAreOptions) {
  const auto plain = shapes(mamba2(""));
  EXPECT_TRUE(plain.contains("backbone.layers.1.mixer.conv1d.bias"));
  EXPECT_FALSE(plain.contains("backbone.layers.1.mixer.in_proj.bias"));
  const auto other = shapes(mamba2(R"("use_bias": true, "use_conv_bias": false)"));
  EXPECT_FALSE(other.contains("backbone.layers.1.mixer.conv1d.bias"));
  EXPECT_EQ(other.at("backbone.layers.1.mixer.in_proj.bias"), Shape({64 + 64 + 2 * 2 * 8 + 4}));
  EXPECT_EQ(other.at("backbone.layers.1.mixer.out_proj.bias"), Shape({32}));
}

TEST(Mamba2Config, IgnoresUnknownKeysAndReadsInfinity) {
  EXPECT_EQ(refusal(mamba2(R"("something": [1], "time_step_limit": [0.5, Infinity])")), "accepted");
}

TEST(Mamba2Config, RefusesWrongValuesByTheirKey) {
  for (const auto& [options, key] : std::vector<std::pair<std::string, std::string>>{
           {R"("time_step_limit": [1])", "time_step_limit"},
           {R"("time_step_limit": [1, 0.5])", "time_step_limit"},
           {R"("time_step_limit": [0, "inf"])", "time_step_limit"},
           {R"("time_step_rank": "car")", "time_step_rank"},
           {R"("time_step_min": 1)", "time_step_min"},
           {R"("expand": 3)", "num_heads"},
           {R"("n_groups": 3)", "n_groups"},
           {R"("conv_kernel": 0)", "conv_kernel"},
           {R"("hidden_act": "tanh")", "hidden_act"},
           {R"("use_bias": 1)", "use_bias"},
           {R"("chunk_size": -1)", "chunk_size"},
           {R"("layer_norm_epsilon": -1)", "layer_norm_epsilon"}}) {
    EXPECT_THAT(refusal(mamba2(options)), HasSubstr("config.json: key '" + key + "'")) << options;
  }
}

TEST(Hgrn2Config, HeadsFollowFromTheExpandRatioOrTheOtherWay) {
  const auto by_ratio = shapes(hgrn2(R"("expand_ratio": 8)"));
  EXPECT_EQ(by_ratio.at("model.layers.0.attn.f_proj.weight"), Shape({32, 32}));
  const auto by_heads = shapes(hgrn2(R"("num_heads": 2, "expand_ratio": null)"));
  EXPECT_EQ(by_heads.at("model.layers.0.attn.f_proj.weight"), Shape({32, 32}));
  const auto by_both = shapes(hgrn2(R"("num_heads": 2, "expand_ratio": 5)"));
  EXPECT_EQ(by_both.at("model.layers.0.attn.f_proj.weight"), Shape({10, 32}));
}

TEST(Hgrn2Config, PartsAreOptions) {
  const auto plain = shapes(hgrn2(R"("expand_ratio": 8)"));
  EXPECT_EQ(plain.at("model.lower_bounds"), Shape({2, 32}));
  EXPECT_TRUE(plain.contains("model.layers.0.attn.g_norm.weight"));
  EXPECT_FALSE(plain.contains("model.layers.0.attn.q_conv1d.weight"));
  const auto other = shapes(hgrn2(
      R"("expand_ratio": 8, "use_lower_bound": false, "elementwise_affine": false,
         "use_short_conv": true, "conv_size": 3)"));
  EXPECT_FALSE(other.contains("model.lower_bounds"));
  EXPECT_FALSE(other.contains("model.layers.0.attn.g_norm.weight"));
  EXPECT_EQ(other.at("model.layers.0.attn.i_conv1d.weight"), Shape({32, 1, 3}));
}

TEST(Hgrn2Config, RefusesWrongValuesByTheirKey) {
  for (const auto& [options, key] : std::vector<std::pair<std::string, std::string>>{
           {R"("expand_ratio": null)", "expand_ratio"},
           {R"("expand_ratio": 64)", "expand_ratio"},
           {R"("num_heads": 5)", "num_heads"},
           {R"("expand_ratio": 8, "hidden_act": "relu")", "hidden_act"},
           {R"("expand_ratio": 8, "attn_mode": "slow")", "attn_mode"},
           {R"("expand_ratio": 8, "use_lower_bound": null)", "use_lower_bound"}}) {
    EXPECT_THAT(refusal(hgrn2(options)), HasSubstr("config.json: key '" + key + "'")) << options;
  }
}

TEST(SambaConfig, AttentionLayersAreEverySecondOrListedOrNone) {
  const auto attends = [](const std::map<std::string, Shape>& names) {
    std::vector<int> layers;
    for (int l = 0; l < 4; ++l) {
      const std::string prefix = "backbone.layers." + std::to_string(l) + ".mixer.";
      EXPECT_NE(names.contains(prefix + "q_proj.weight"), names.contains(prefix + "A_log"));
      if (names.contains(prefix + "q_proj.weight")) layers.push_back(l);
    }
    return layers;
  };
  EXPECT_EQ(attends(shapes(samba(R"("attn": {"layers": null, "num_heads": 2})"))),
            (std::vector{1, 3}));
  EXPECT_EQ(attends(shapes(samba(R"("attn": {"layers": [0, 3], "num_heads": 2})"))),
            (std::vector{0, 3}));
  EXPECT_EQ(attends(shapes(samba(R"("attn": {"layers": [], "num_heads": 2})"))),
            std::vector<int>());
  EXPECT_EQ(attends(shapes(samba(""))), std::vector<int>());
}

TEST(SambaConfig, SizesAreOptions) {
  const auto other = shapes(samba(
      R"("attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 8},
         "mamba_hidden_ratio": 20, "attn_hidden_ratio": null, "time_step_rank": 3, "expand": 3,
         "state_size": 5, "use_bias": true, "use_conv_bias": false)"));
  const std::string mamba = "backbone.layers.0.";
  EXPECT_EQ(other.at(mamba + "mixer.x_proj.weight"), Shape({3 + 2 * 5, 96}));
  EXPECT_EQ(other.at(mamba + "mixer.dt_proj.weight"), Shape({96, 3}));
  EXPECT_EQ(other.at(mamba + "mixer.A_log"), Shape({96, 5}));
  EXPECT_EQ(other.at(mamba + "mixer.in_proj.bias"), Shape({192}));
  EXPECT_FALSE(other.contains(mamba + "mixer.conv1d.bias"));
  EXPECT_EQ(other.at(mamba + "mlp.down_proj.weight"), Shape({32, 512}));
  EXPECT_EQ(other.at("backbone.layers.1.mixer.k_proj.weight"), Shape({16, 32}));
  EXPECT_EQ(other.at("backbone.layers.1.mlp.down_proj.weight"), Shape({32, 256}));
  EXPECT_EQ(shapes(samba("")).at(mamba + "mixer.dt_proj.weight"), Shape({64, 2}));
}

TEST(SambaConfig, RefusesWrongValuesByTheirKey) {
  for (const auto& [options, key] : std::vector<std::pair<std::string, std::string>>{
           {R"("attn": 3)", "attn"},
           {R"("attn": {"num_heads": 2})", "attn.layers"},
           {R"("attn": {"layers": null})", "attn.num_heads"},
           {R"("attn": {"layers": [4], "num_heads": 2})", "attn.layers"},
           {R"("attn": {"layers": null, "num_heads": 32})", "attn.num_heads"},
           {R"("attn": {"layers": null, "num_heads": 2, "num_kv_heads": 3})", "attn.num_kv_heads"},
           {R"("attn": {"layers": null, "num_heads": 2, "window_size": 0})", "attn.window_size"},
           {R"("attn": {"layers": null, "num_heads": 4, "num_kv_heads": 3})", "attn.num_kv_heads"},
           {R"("time_step_rank": 0)", "time_step_rank"},
           {R"("time_step_init_scheme": "zero")", "time_step_init_scheme"},
           {R"("expand": 0)", "expand"},
           {R"("hidden_act": "gelu")", "hidden_act"},
           {R"("rope_base": "big")", "rope_base"}}) {
    EXPECT_THAT(refusal(samba(options)), HasSubstr("config.json: key '" + key + "'")) << options;
  }
}

TEST(Mamba2Initialiser, TimeStepsAreLogUniformAndDecaysCountUp) {
  const test::TemporaryDirectory directory;
  const std::string path = directory.path("model");
  write_initialised(mamba2(R"("time_step_limit": [0.0, Infinity], "time_step_min": 0.01,
                              "time_step_max": 0.2, "time_step_floor": 0.05)"),
                    path, {});
  const auto file = io::SafetensorsFile::open(path + "/model.safetensors");
  bool floor_seen = false;
  for (const char* layer : {"0", "1"}) {
    const std::string prefix = "backbone.layers." + std::string(layer) + ".mixer.";
    for (int h = 0; h < 4; ++h) {
      EXPECT_FLOAT_EQ(file.view(prefix + "A_log").f32()[h], std::log(1.0F + static_cast<float>(h)));
      EXPECT_EQ(file.view(prefix + "D").f32()[h], 1);
      const double dt = std::log1p(std::exp(file.view(prefix + "dt_bias").f32()[h]));
      EXPECT_GE(dt, 0.05 * (1 - 1e-6));
      EXPECT_LE(dt, 0.2 * (1 + 1e-6));
      floor_seen |= dt < 0.05 * (1 + 1e-6);
    }
  }
  // Half of the draws lie below the floor.
  EXPECT_TRUE(floor_seen);
  EXPECT_EQ(refusal(test::read_file(path + "/config.json")), "accepted");
  EXPECT_THAT(test::read_file(path + "/config.json"),
              HasSubstr("\"deltafox_random_weights\": true"));
}

}  // namespace
}  // namespace deltafox
