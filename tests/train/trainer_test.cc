// The training loop on models that train in a moment.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include "deltafox/model.h"
#include "io/safetensors.h"
#include "support/training.h"
#include "train/checkpoint.h"

namespace deltafox::test {
namespace {

TEST_F(Training, ADeltaNetLearnsAShortTextByHeart) {
  const std::vector<double> losses = train(config("run"), 2);
  EXPECT_GT(losses.front(), 5);
  EXPECT_LT(losses.back(), 0.1);
  // And so does the model that is exported.
  const Model model = Model::load(directory_.path("run/model"));
  const io::TokenFile file = io::TokenFile::open(directory_.path("train.tokens"));
  std::vector<std::int32_t> labels(32);
  file.read(64, labels);
  std::vector<std::int32_t> ids{255};
  ids.insert(ids.end(), labels.begin(), labels.end() - 1);
  const std::vector<std::int64_t> cu_seqlens{0, 32};
  State state = model.new_state();
  const std::vector<State*> states{&state};
  std::vector<float> loss(32);
  model.loss({ids, cu_seqlens}, labels, states, loss);
  double mean = 0;
  for (const float value : loss) mean += value / 32;
  EXPECT_LT(mean, 0.2);
}

TEST_F(Training, InterruptedAndResumedIsAsUninterrupted) {
  for (const std::string precision : {"32-true", "bf16-mixed"}) {
    SCOPED_TRACE(precision);
    const std::string whole_run = "whole-" + precision;
    const std::string parts_run = "parts-" + precision;
    const std::vector<std::string> short_run{"train.max_tokens=3072", "train.grad_acc_tokens=64",
                                             "fabric.precision=" + precision};
    const std::vector<double> whole = train(config(whole_run, short_run), 2);
    // On another number of threads each time, with and without recomputation.
    std::vector<double> parts = train(config(parts_run, short_run), 1, 3 * 256);
    auto recomputing = short_run;
    recomputing.emplace_back("train.gradient_checkpointing=true");
    for (const auto& [threads, tokens] : {std::pair{3, 7 * 256}, {2, -1}}) {
      const std::vector<double> more = train(config(parts_run, recomputing), threads, tokens);
      parts.insert(parts.end(), more.begin(), more.end());
    }
    EXPECT_EQ(parts, whole);
    EXPECT_EQ(read_file(directory_.path(parts_run + "/model/model.safetensors")),
              read_file(directory_.path(whole_run + "/model/model.safetensors")));
    EXPECT_EQ(log(parts_run, "train").size(), log(whole_run, "train").size());
    EXPECT_EQ(log(parts_run, "train_eval"), log(whole_run, "train_eval"));
  }
}

TEST_F(Training, AccumulatedGradientsAreThoseOfTheBatch) {
  const std::vector<double> once =
      train(config("once", {"train.max_tokens=1280", "train.grad_acc_tokens=256"}), 2);
  const std::vector<double> often =
      train(config("often", {"train.max_tokens=1280", "train.grad_acc_tokens=32"}), 2);
  ASSERT_EQ(once.size(), often.size());
  for (std::size_t i = 0; i < once.size(); ++i) EXPECT_NEAR(once[i], often[i], 1e-4);
}

TEST_F(Training, KeepsTheNewestCheckpointAndThoseAtTheInterval) {
  train(config("run", {"train.max_tokens=2560", "checkpoint_interval=256",
                       "checkpoint_keep_interval=1024"}),
        2);
  EXPECT_THAT(checkpoints("run"), testing::ElementsAre("step-000000000001024.safetensors",
                                                       "step-000000000002048.safetensors",
                                                       "step-000000000002560.safetensors"));
}

TEST_F(Training, LogsWhatTheOfficialScriptLogs) {
  train(config("run", {"train.max_tokens=1280", "log_interval=512", "train_eval_interval=1280",
                       "skip_eval=false", "eval_interval=1280", "eval.min_val_length=8"}),
        2);
  const auto steps = log("run", "train");
  ASSERT_EQ(steps.size(), 2U);
  EXPECT_EQ(steps[1].at("step"), 1024);
  for (const char* key : {"train/loss", "train/lr", "train/global_grad_norm"}) {
    EXPECT_TRUE(steps[0].at(key).is_number()) << key;
  }
  for (const char* name : {"train_eval", "val"}) {
    const auto lines = log("run", name);
    ASSERT_EQ(lines.size(), 1U);
    const std::string prefix = std::string(name) + "/loss_avg_len_";
    EXPECT_TRUE(lines[0].contains(prefix + "32"));
    EXPECT_TRUE(lines[0].contains(prefix + "8"));
    EXPECT_FALSE(lines[0].contains(prefix + "4"));
    const auto losses = io::SafetensorsFile::open(directory_.path(
        "run/metrics/arrays/" + std::string(name) + "/step-000000000001280.safetensors"));
    EXPECT_EQ(losses.view("loss_per_token").shape, Shape({32}));
  }
  EXPECT_NEAR(log("run", "train_eval")[0].at("train_eval/loss_avg_len_32"), 5.3, 0.5);
}

TEST_F(Training, NamesTheMissingHeldOutTexts) {
  const std::string path = directory_.path("heldout.tokens");
  std::filesystem::remove(path);
  const std::string error = error_of([&] {
    train(config("run", {"train.max_tokens=256", "skip_eval=false"}), 2);
  });
  EXPECT_THAT(error, testing::StartsWith(path + ": is missing"));
  EXPECT_THAT(error, testing::HasSubstr("--heldout"));
}

TEST_F(Training, StopsWithTheStepAndTheLastGoodCheckpoint) {
  train(config("run", {"train.max_tokens=2560"}), 2, 512);
  const std::string last = *train::newest_checkpoint(directory_.path("run"));
  // A learning rate beyond all reason, after which nothing is finite.
  const std::string error = error_of([&] {
    train(config("run", {"train.max_tokens=2560", "schedule.peak_value=1e6",
                         "schedule.init_value=1e6", "optimizer.weight_decay=1e6"}),
          2);
  });
  EXPECT_THAT(error, testing::MatchesRegex("step .* \\(after .* tokens\\): the .* is .*nan.*"));
  EXPECT_THAT(error, testing::HasSubstr("the last good checkpoint is " + last));
}

TEST_F(Training, StartsFromAModelOrAForkOfARun) {
  train(config("run", {"train.max_tokens=1280", "checkpoint_interval=256",
                       "checkpoint_keep_interval=256"}),
        2);
  const std::vector<double> tuned = train(
      config("tuned", {"train.max_tokens=256", "pretrained=" + directory_.path("run/model")}), 2);
  EXPECT_LT(tuned[0], 5.3);
  const std::vector<double> whole = train(config("whole", {"train.max_tokens=1280"}), 2);
  const std::vector<double> forked = train(
      config("fork",
             {"train.max_tokens=1280", "fork_dir=" + directory_.path("run"), "fork_step=768"}),
      2);
  EXPECT_EQ(forked, (std::vector<double>{whole[3], whole[4]}));
}

TEST_F(Training, RefusesACheckpointOfAnotherModelOrStep) {
  train(config("run", {"train.max_tokens=256"}), 2);
  EXPECT_THAT(error_of([&] { train(config("run", {"model.config.hidden_size=64"}), 2); }),
              testing::HasSubstr("step-000000000000256.safetensors: tensor 'weights."));
  EXPECT_THAT(error_of([&] {
                train(config("run", {"datamodule.train_batch_size=4", "train.max_tokens=512"}), 2);
              }),
              testing::HasSubstr("which are not the steps of 128 tokens here"));
}

}  // namespace
}  // namespace deltafox::test
