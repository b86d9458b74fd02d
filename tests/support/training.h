// A training that takes a moment: a tiny DeltaNet learns 8 windows of a text by heart, as bytes.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "io/token_file.h"
#include "support/errors.h"
#include "support/temporary.h"
#include "train/trainer.h"

namespace deltafox::test {

class Training : public testing::Test {
 protected:
  explicit Training(Device device = Device::kCpu) : device_(device) {
    const std::string text = read_file(std::string(DELTAFOX_SOURCE_DIR) + "/LICENSE");
    std::vector<std::int32_t> ids;
    for (const char c : text.substr(0, 8 * 32)) ids.push_back(static_cast<unsigned char>(c));
    for (const char* split : {"train", "heldout"}) {
      io::TokenFileWriter writer(directory_.path(std::string(split) + ".tokens"), 256, 255);
      writer.append(ids);
      writer.finish(1);
    }
  }

  train::Config config(const std::string& run, std::vector<std::string> overrides = {}) const {
    // Whatever the length of the run, the learning rate is the same.
    overrides.emplace_back("schedule.decay_steps=15360");
    overrides.push_back("data_dir=" + directory_.path());
    overrides.push_back("output_dir=" + directory_.path(run));
    return train::load_config(std::string(DELTAFOX_SOURCE_DIR) + "/configs/tiny/delta_net.yaml",
                              overrides);
  }
  // Trains until `tokens` are done or to the end, and returns the losses of the steps.
  std::vector<double> train(const train::Config& config, int threads,
                            std::int64_t tokens = -1) const {
    std::atomic<bool> stop = false;
    std::vector<double> losses;
    train::Listener listener;
    listener.on_step = [&](const train::StepReport& report) {
      losses.push_back(report.loss);
      if (report.tokens == tokens) stop = true;
    };
    train::Trainer trainer(config, threads, device_, listener);
    EXPECT_EQ(trainer.run(stop), tokens < 0 ? train::Outcome::kFinished : train::Outcome::kStopped);
    return losses;
  }
  std::vector<nlohmann::json> log(const std::string& run, const std::string& name) const {
    std::ifstream in(directory_.path(run + "/metrics/jsonlines/" + name + ".jsonl"));
    std::vector<nlohmann::json> lines;
    for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
    return lines;
  }
  std::vector<std::string> checkpoints(const std::string& run) const {
    std::vector<std::string> names;
    for (const auto& entry :
         std::filesystem::directory_iterator(directory_.path(run + "/checkpoints"))) {
      names.push_back(entry.path().filename().string());
    }
    std::sort(names.begin(), names.end());
    return names;
  }

  Device device_;
  TemporaryDirectory directory_;
};

}  // namespace deltafox::test
