// What the hub tests share: an empty cache, a fake hub, and the environment that leads to both.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <map>
#include <optional>
#include <string>

#include "deltafox/hub.h"
#include "io/fake_hub.h"
#include "support/errors.h"

namespace deltafox::test {

// Sets environment variables, and puts back what was there.
class Environment {
 public:
  Environment() = default;
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;
  ~Environment() {
    for (const auto& [name, value] : before_) assign(name, value);
  }
  void set(const std::string& name, std::optional<std::string> value) {
    const char* before = ::getenv(name.c_str());
    before_.try_emplace(name,
                        before == nullptr ? std::nullopt : std::optional<std::string>(before));
    assign(name, value);
  }

 private:
  static void assign(const std::string& name, const std::optional<std::string>& value) {
    if (value)
      ::setenv(name.c_str(), value->c_str(), 1);
    else
      ::unsetenv(name.c_str());
  }
  std::map<std::string, std::optional<std::string>> before_;
};

class HubTest : public ::testing::Test {
 protected:
  HubTest() {
    std::string pattern = (std::filesystem::temp_directory_path() / "deltafox-hub-XXXXXX").string();
    root_ = ::mkdtemp(pattern.data());
    for (const char* name :
         {"HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HF_TOKEN", "HF_TOKEN_PATH",
          "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"})
      environment_.set(name, std::nullopt);
    environment_.set("HF_HOME", root_.string());
    environment_.set("HF_ENDPOINT", hub_.url());

    hub_.files["config.json"] = R"({"model_type": "delta_net-project_fox"})";
    hub_.files["vocab.json"] = R"({"a": 0})";
    hub_.files["README.md"] = "not needed";
    hub_.files["pytorch_model.bin"] = "not wanted";
    std::string weights(100'000, '\0');
    for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<char>(i * i % 251);
    hub_.files[kWeights] = weights;

    options_.retry_delay = std::chrono::milliseconds(1);
    options_.max_retries = 2;
  }
  ~HubTest() override { std::filesystem::remove_all(root_); }

  static constexpr const char* kWeights = "model.safetensors";

  std::string pull() { return hub::pull(hub_.id, options_); }

  // The message of the Error that a pull throws.
  std::string pull_error() {
    return error_of([this] { pull(); });
  }

  std::filesystem::path repository() const { return root_ / "hub" / "models--org--tiny"; }
  std::filesystem::path partial() const {
    return repository() / "blobs" / (hub_.etag(kWeights) + ".incomplete");
  }

  static std::string contents(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    EXPECT_TRUE(file.is_open()) << path;
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static void write(const std::filesystem::path& path, const std::string& text) {
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
  }

  // Applies `change` to the first `times` requests of this brief.
  void misbehave(const std::string& brief, int times,
                 const std::function<void(HubReply&)>& change) {
    auto count = std::make_shared<std::atomic<int>>(0);
    hub_.intercept = [=](const HubRequest& request, HubReply& reply) {
      if (request.brief() == brief && (*count)++ < times) change(reply);
    };
  }
  static constexpr int kAlways = 1'000'000;

  FakeHub hub_;
  Environment environment_;
  std::filesystem::path root_;
  hub::PullOptions options_;
};

}  // namespace deltafox::test
