// Configuration files and learning-rate schedules.
#include "train/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numbers>

#include "core/error.h"
#include "model/registry.h"
#include "support/temporary.h"

namespace deltafox::test {
namespace {

using train::Config;
using train::Schedule;

const std::string kConfigs = std::string(DELTAFOX_SOURCE_DIR) + "/configs/";
const std::vector<std::string> kPlaces{"data_dir=data", "output_dir=out"};

Config paper_config(const std::string& name) {
  return train::load_config(kConfigs + "longcrawl64/" + name + ".yaml", kPlaces);
}

// The model that a paper's run trains is the preset of that name.
void expect_preset(const std::string& run, const std::string& preset) {
  const auto got = nlohmann::json::parse(train::model_config(paper_config(run), 50257, 50256));
  EXPECT_EQ(got, nlohmann::json::parse(preset_config(preset))) << run;
}

TEST(PaperConfigs, AllDescribeAModel) {
  int count = 0;
  for (const auto& entry :
       std::filesystem::recursive_directory_iterator(kConfigs + "longcrawl64")) {
    if (!entry.is_regular_file() || entry.path().filename() == "base.yaml") continue;
    const Config config = train::load_config(entry.path().string(), kPlaces);
    build_model(io::JsonObject::parse(train::model_config(config, 50257, 50256), "model"));
    EXPECT_EQ(config.max_tokens % (32 * 16384), 0);
    EXPECT_EQ(config.schedule(config.schedule.warmup_steps), config.optimizer.lr);
    ++count;
  }
  EXPECT_EQ(count, 30);
}

TEST(PaperConfigs, TrainTheModelsThatTheReleasedOnesAre) {
  for (const auto& [size, run] :
       {std::pair{"125m", "125m_2b"}, {"360m", "360m_7b"}, {"760m", "760m_48b"}}) {
    const auto name = [](const std::string& head, const char* tail) { return head + tail; };
    for (const char* model : {"delta_net", "hgrn2", "mamba2"}) {
      expect_preset(name(std::string(model) + "/", run), name(std::string(model) + "-", size));
    }
    for (const char* kind : {"llama", "pro"}) {
      const std::string k(kind);
      expect_preset(name("forgetting_transformer/" + k + "_", run), name("fox_" + k + "-", size));
      expect_preset(name("transformer/" + k + "_", run), name("transformer_" + k + "-", size));
    }
  }
  expect_preset("samba/760m_16b", "samba-760m");
}

TEST(PaperConfigs, SayWhatThePaperSays) {
  const Config config = paper_config("delta_net/760m_48b");
  EXPECT_EQ(config.optimizer.lr, 1e-3);
  EXPECT_EQ(config.optimizer.betas[1], 0.95);
  EXPECT_EQ(config.optimizer.weight_decay, 0.1);
  EXPECT_EQ(config.max_tokens, 48'318'382'080);
  EXPECT_EQ(config.schedule.decay_steps, config.max_tokens);
  EXPECT_EQ(config.data.train.tokens(), 32 * 16384);
  EXPECT_EQ(config.data.train_path, "data/longcrawl64/train.zarr");
  EXPECT_EQ(config.precision, train::Precision::kBF16Mixed);
  EXPECT_TRUE(config.gradient_checkpointing);
}

class ConfigFile : public testing::Test {
 protected:
  Config load(const std::string& text, const std::vector<std::string>& overrides = {}) const {
    return train::load_config(directory_.write("run.yaml", text), overrides);
  }
  std::string error(const std::string& text, const std::vector<std::string>& overrides = {}) const {
    try {
      load(text, overrides);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  // The file's text with one line replaced or added.
  static std::string with(const std::string& line, const std::string& instead) {
    std::string text = kText;
    return text.replace(text.find(line), line.size(), instead);
  }

  static constexpr const char* kText = R"(output_dir: out
data_dir: data
train:
  max_tokens: 640
  grad_acc_tokens: 32
  max_grad_norm: 1.0
model:
  name: delta_net
  config: {hidden_size: 16, num_hidden_layers: 1, num_heads: 1}
optimizer:
  lr: 1e-3
  betas: [0.9, 0.95]
  weight_decay: 0.1
schedule:
  name: constant
  value: ${optimizer.lr}
datamodule:
  name: tokens
  train_batch_len: 16
  train_batch_size: 4
)";

  TemporaryDirectory directory_;
};

TEST_F(ConfigFile, IsReadWithDefaults) {
  const Config config = load(kText);
  EXPECT_EQ(config.schedule.value, 1e-3);
  EXPECT_EQ(config.log_interval, 64);
  EXPECT_EQ(config.checkpoint_interval, 640);
  EXPECT_EQ(config.data.eval.length, 16);
  EXPECT_TRUE(config.decay.convolution);
  EXPECT_FALSE(config.decay.bias);
}

TEST_F(ConfigFile, AnUnknownKeyIsAnErrorOfItsLine) {
  EXPECT_THAT(error(with("  max_grad_norm", "  max_gard_norm: 1\n  max_grad_norm")),
              testing::HasSubstr("run.yaml: line 6: key 'train.max_gard_norm' is unknown"));
  EXPECT_THAT(error(with("num_heads", "heads: 3, num_heads")),
              testing::HasSubstr("run.yaml: line 9: key 'model.config.heads' is unknown"));
  EXPECT_THAT(error("sed: 1\n" + std::string(kText)),
              testing::HasSubstr("run.yaml: line 1: key 'sed' is unknown"));
  EXPECT_THAT(error(kText, {"train.speed=11"}),
              testing::HasSubstr("'train.speed=11': key 'train.speed' is unknown"));
}

TEST_F(ConfigFile, AValueOfAnotherTypeIsAnErrorOfItsLine) {
  EXPECT_THAT(
      error(with("max_tokens: 640", "max_tokens: many")),
      testing::HasSubstr("run.yaml: line 4: key 'train.max_tokens': must be a whole number"));
  EXPECT_THAT(error(with("[0.9, 0.95]", "0.9")),
              testing::HasSubstr("line 12: key 'optimizer.betas': must be a list"));
  EXPECT_THAT(error(with("output_dir: out", "output_dir: ???")),
              testing::HasSubstr("line 1: key 'output_dir': has to be given"));
  EXPECT_THAT(error(with("max_tokens: 640", "max_tokens: 650")),
              testing::HasSubstr("'train.max_tokens': 650 is no multiple"));
  EXPECT_THAT(error(with("${optimizer.lr}", "${optimiser.lr}")),
              testing::HasSubstr("line 16: '${optimiser.lr}' refers to no value"));
  EXPECT_THAT(error("a: [1\n"), testing::HasSubstr("run.yaml: line 2: "));
  EXPECT_THAT(error(kText + std::string("seed: 1\nseed: 2\n")), testing::HasSubstr("there twice"));
}

TEST_F(ConfigFile, OverridesComeLast) {
  const Config config = load(kText, {"optimizer.lr=0.5", "seed=7", "model.config.use_gate=true"});
  EXPECT_EQ(config.optimizer.lr, 0.5);
  EXPECT_EQ(config.schedule.value, 0.5);
  EXPECT_EQ(config.seed, 7U);
  EXPECT_TRUE(nlohmann::json::parse(config.model_json).at("use_gate").get<bool>());
}

TEST_F(ConfigFile, BuildsOnOthersButNotInACircle) {
  directory_.write("base.yaml", kText);
  EXPECT_EQ(load("defaults: [base, _self_]\nseed: 3\n").seed, 3U);
  EXPECT_THAT(error("defaults: [run]\n"), testing::HasSubstr("circle"));
}

TEST(Schedule, WarmsUpLinearly) {
  const Schedule schedule{.kind = Schedule::Kind::kWarmupCosine,
                          .init_value = 0.1,
                          .peak_value = 1.1,
                          .warmup_steps = 100,
                          .decay_steps = 1000};
  EXPECT_DOUBLE_EQ(schedule(0), 0.1);
  EXPECT_DOUBLE_EQ(schedule(25), 0.35);
  EXPECT_DOUBLE_EQ(schedule(100), 1.1);
}

TEST(Schedule, DecaysAlongACosine) {
  const Schedule schedule{.kind = Schedule::Kind::kWarmupCosine,
                          .peak_value = 2,
                          .end_value = 0.5,
                          .warmup_steps = 100,
                          .decay_steps = 1100};
  EXPECT_DOUBLE_EQ(schedule(350), 0.5 + 1.5 * (1 + std::cos(std::numbers::pi / 4)) / 2);
  EXPECT_DOUBLE_EQ(schedule(600), 1.25);
  EXPECT_DOUBLE_EQ(schedule(1100), 0.5);
  EXPECT_DOUBLE_EQ(schedule(5000), 0.5);
}

TEST(Schedule, DecaysLinearly) {
  const Schedule schedule{.kind = Schedule::Kind::kWarmupLinear,
                          .peak_value = 2,
                          .end_value = 1,
                          .warmup_steps = 0,
                          .decay_steps = 1000};
  EXPECT_DOUBLE_EQ(schedule(0), 2);
  EXPECT_DOUBLE_EQ(schedule(250), 1.75);
  EXPECT_DOUBLE_EQ(schedule(1000), 1);
}

TEST(Schedule, AnnealsByOneMinusTheRoot) {
  const Schedule schedule{.kind = Schedule::Kind::kWarmupOneMinusSqrt,
                          .peak_value = 2,
                          .end_value = 0,
                          .warmup_steps = 10,
                          .total_steps = 1000,
                          .anneal_steps = 400};
  EXPECT_DOUBLE_EQ(schedule(600), 2);
  EXPECT_DOUBLE_EQ(schedule(700), 1);
  EXPECT_DOUBLE_EQ(schedule(1000), 0);
}

}  // namespace
}  // namespace deltafox::test
