// tokenize, detokenize, info, init, pull and bench.
#include <gtest/gtest.h>

#include <csignal>
#include <fstream>

#include "apps/checkpoints.h"
#include "apps/program.h"
#include "io/fake_hub.h"

namespace deltafox::test {
namespace {

class Tokens : public testing::Test {
 protected:
  Tokens() {
    const std::string gpt2 = std::string(DELTAFOX_TEST_DATA) + "/gpt2/";
    for (const char* file : {"vocab.json", "merges.txt"}) {
      std::filesystem::copy_file(gpt2 + file, directory_.path(file));
    }
  }
  Result run(const std::string& command, const Arguments& more,
             const Surroundings& surroundings = {}) const {
    Arguments arguments{command, "--model", directory_.path()};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_program(arguments, surroundings);
  }

  TemporaryDirectory directory_;
};

TEST_F(Tokens, AreThoseOfGpt2) {
  const Result result = run("tokenize", {"Hello world"});
  expect_success(result);
  EXPECT_EQ(result.out, "15496,995\n");
  EXPECT_EQ(run("tokenize", {"Hello world", "--json"}).json(),
            nlohmann::json({{"ids", {15496, 995}}, {"count", 2}}));
  EXPECT_EQ(run("detokenize", {"15496,995"}).out, "Hello world");
  EXPECT_EQ(run("detokenize", {"15496", "995"}).out, "Hello world");
  EXPECT_EQ(run("detokenize", {"15496 995 50256", "--skip-special-tokens"}).out, "Hello world");
  EXPECT_EQ(run("detokenize", {"15496,995,50256", "--json"}).json().at("text"),
            "Hello world<|endoftext|>");
}

TEST_F(Tokens, OfAnyTextComeBackToTheByte) {
  const std::string text = " Füchse 🦊\n\tjumped…\r\n\n";
  for (const char* tokenizer_class : {"GPT2Tokenizer", "JSONGPT2Tokenizer"}) {
    directory_.write("tokenizer_config.json",
                     nlohmann::json{{"tokenizer_class", tokenizer_class}}.dump());
    const Result ids = run("tokenize", {}, {.input = text});
    expect_success(ids);
    EXPECT_EQ(run("tokenize", {"--", text}).out, ids.out);
    EXPECT_EQ(run("detokenize", {}, {.input = ids.out}).out, text);
  }
}

TEST_F(Tokens, RefuseWhatIsNoTextOrNoId) {
  expect_refusal(run("tokenize", {"a\xff"}), {"UTF-8"});
  expect_refusal(run("tokenize", {}, {.input = "a\xff"}), {"UTF-8"});
  expect_refusal(run("tokenize", {"--file", "/no/such/file"}), {"/no/such/file"});
  expect_refusal(run("detokenize", {"50257"}), {"50257"});
  expect_refusal(run("detokenize", {"-1"}), {"-1"});
  expect_refusal(run("detokenize", {"1,b"}), {"b"});
  expect_refusal(run("detokenize", {}, {.input = "1 2 x"}), {"stdin", "x"});
}

TEST(Info, ShowsTheModel) {
  const Arguments arguments{"info", "--model", golden_directory("delta_net-tiny")};
  const Result text = run_program(arguments);
  expect_success(text);
  EXPECT_THAT(text.out, testing::HasSubstr("116,864"));
  Arguments with_json = arguments;
  with_json.emplace_back("--json");
  const nlohmann::json json = run_program(with_json).json();
  EXPECT_EQ(json.at("model_type"), "delta_net-project_fox");
  EXPECT_EQ(json.at("parameters"), 116864);
  EXPECT_EQ(json.at("non_embedding_parameters"), 116864 - 256 * 64);
  EXPECT_EQ(json.at("weight_bytes"), 4 * 116864);
  EXPECT_EQ(json.at("stored_dtypes"), nlohmann::json({"F32"}));
  EXPECT_EQ(json.at("config").at("hidden_size"), 64);
  EXPECT_TRUE(json.at("files").contains("model.safetensors"));
}

class Init : public testing::Test {
 protected:
  Init() {
    config_ = nlohmann::json{{"model_type", "delta_net-project_fox"},
                             {"hidden_size", 32},
                             {"num_hidden_layers", 2},
                             {"num_heads", 2},
                             {"vocab_size", 100},
                             {"bos_token_id", 99},
                             {"eos_token_id", 99}};
    directory_.write("small.json", config_.dump());
  }
  Result run(const std::string& output, const Arguments& more = {},
             const Surroundings& surroundings = {}) const {
    Arguments arguments{"init", "--config", directory_.path("small.json"), "--output",
                        directory_.path(output)};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_program(arguments, surroundings);
  }

  nlohmann::json config_;
  TemporaryDirectory directory_;
};

TEST_F(Init, MakesACheckpointThatWorks) {
  expect_success(run("a", {"--seed", "3"}));
  const Result info = run_program({"info", "--model", directory_.path("a"), "--json"});
  expect_success(info);
  EXPECT_EQ(info.json().at("random_weights"), true);
  const Result generated = run_program(
      {"generate", "--model", directory_.path("a"), "--input-ids", "1,2,3", "--output-ids"});
  EXPECT_EQ(generated.exit_code, 0);
  EXPECT_TRUE(generated.out.starts_with("1,2,3,"));
  EXPECT_THAT(generated.err, testing::HasSubstr("random"));
}

TEST_F(Init, DependsOnTheSeedAlone) {
  expect_success(run("a", {"--seed", "3", "--threads", "1"}));
  expect_success(run("b", {"--seed", "3", "--threads", "3"}));
  expect_success(run("c", {"--seed", "4"}));
  const auto weights = [&](const std::string& name) {
    return read_file(directory_.path(name + "/model.safetensors"));
  };
  EXPECT_EQ(weights("a"), weights("b"));
  EXPECT_NE(weights("a"), weights("c"));
  expect_success(run("d", {"--dtype", "bfloat16"}));
  EXPECT_LT(weights("d").size(), weights("a").size() * 6 / 10);
}

TEST_F(Init, RefusesWhatCannotBeMade) {
  expect_success(run("a"));
  expect_refusal(run("a"), {directory_.path("a"), "exists"});
  expect_refusal(run("b", {"--dtype", "int4"}), {"--dtype", "int4"});
  expect_refusal(run("small.json/b"), {"small.json/b"});
  expect_refusal(run_program({"init", "--output", directory_.path("b")}), {"NAME", "--config"});
  expect_refusal(run_program({"init", "gpt-5", "--output", directory_.path("b")}),
                 {"gpt-5", "delta_net-760m"});
  config_["num_heads"] = 3;
  directory_.write("small.json", config_.dump());
  expect_refusal(run("b"), {"small.json", "num_heads"});
}

TEST_F(Init, LeavesNothingHalfWrittenOnAFullDisk) {
  expect_refusal(run("b", {}, {.max_file_bytes = 5000}), {"model.safetensors"});
  EXPECT_FALSE(std::filesystem::exists(directory_.path("b/model.safetensors")));
  EXPECT_FALSE(std::filesystem::exists(directory_.path("b/config.json")));
}

TEST(Pull, FetchesACheckpointThatOtherCommandsFindByItsId) {
  FakeHub hub;
  for (const char* file : {"config.json", "model.safetensors"}) {
    hub.files[file] = read_file(golden_directory("delta_net-tiny") + "/" + file);
  }
  const TemporaryDirectory home;
  const Surroundings surroundings{
      .environment = {{"HF_HOME", home.path()}, {"HF_ENDPOINT", hub.url()}}};
  const Result result = run_program({"pull", "org/tiny"}, surroundings);
  expect_success(result);
  ASSERT_TRUE(result.out.ends_with("\n"));
  const std::string directory = result.out.substr(0, result.out.size() - 1);
  EXPECT_TRUE(std::filesystem::exists(directory + "/config.json"));
  const Result info = run_program({"info", "--model", "org/tiny", "--json"}, surroundings);
  expect_success(info);
  EXPECT_EQ(info.json().at("directory"), directory);
}

TEST(Bench, OfAModelReportsSpeedAndBandwidthOfEveryCase) {
  const Result result =
      run_program({"bench", "model", "--model", golden_directory("delta_net-tiny"), "--prompt",
                   "0,16", "--gen", "4", "--runs", "2", "--batch", "2", "--json"});
  expect_success(result);
  const nlohmann::json cases = result.json().at("cases");
  ASSERT_EQ(cases.size(), 2U);
  EXPECT_FALSE(cases[0].contains("prefill_seconds"));
  EXPECT_GT(cases[1].at("prefill_tokens_per_second"), 0);
  // 2 layers of the rule, and no op that takes longer than all of them.
  double seconds = 0;
  for (const nlohmann::json& time : cases[1].at("first_prefill_ops")) {
    seconds += time.at("seconds").get<double>();
    if (time.at("op") == "delta_rule") {
      EXPECT_EQ(time.at("calls"), 2);
    }
  }
  EXPECT_GT(seconds, 0);
  EXPECT_LE(seconds, cases[1].at("prefill_seconds")[0].get<double>());
  for (const nlohmann::json& one : cases) {
    EXPECT_GT(one.at("decode_tokens_per_second"), 0);
    EXPECT_GT(one.at("bandwidth_share"), 0);
    EXPECT_EQ(one.at("decode_seconds").size(), 2U);
    // Weights but the embedding, and the states of both sequences read and written.
    EXPECT_EQ(one.at("bytes_per_step"), 4 * (116864 - 256 * 64) + 2 * 2 * 22528);
  }
}

TEST(Bench, OfAModelRefusesWhatCannotBeMeasured) {
  const std::string tiny = golden_directory("delta_net-tiny");
  expect_refusal(run_program({"bench", "model", "--model", tiny, "--gen", "-1"}), {"--gen"});
  expect_refusal(run_program({"bench", "model", "--model", tiny, "--prompt", "16,-1"}),
                 {"--prompt"});
  expect_refusal(run_program({"bench", "model", "--model", tiny, "--batch", "0"}), {"--batch"});
}

TEST(Bench, OfTheMachineReportsEveryLimitItHas) {
  const Result result = run_program(
      {"bench", "machine", "--threads", "2", "--runs", "1", "--megabytes", "32", "--json"});
  expect_success(result);
  const nlohmann::json json = result.json();
  ASSERT_EQ(json.at("limits").size(), 2U);
  for (const nlohmann::json& limits : json.at("limits")) {
    EXPECT_GT(limits.at("read_bytes_per_second").at("median"), 1e7);
    for (const nlohmann::json& peak : limits.at("peaks")) {
      if (!peak.at("operations_per_second").is_null()) {
        EXPECT_GT(peak.at("operations_per_second").at("median"), 1e7) << peak;
      }
    }
  }
  expect_refusal(run_program({"bench", "machine", "--runs", "0"}), {"--runs"});
}

TEST(Bench, SaysWhatAnOldMachineDoesNotHave) {
  const Result result =
      run_program({"bench", "machine", "--threads", "1", "--runs", "1", "--megabytes", "32"},
                  {.environment = {{"DELTAFOX_ISA", "plain"}}});
  expect_success(result);
  EXPECT_THAT(result.out, testing::HasSubstr("int8, vpdpbusd                 not available"));
}

}  // namespace
}  // namespace deltafox::test
