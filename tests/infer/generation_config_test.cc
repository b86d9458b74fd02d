#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>

#include "deltafox/generate.h"
#include "support/errors.h"

namespace deltafox {

namespace {

using test::error_of;
using testing::ElementsAre;

std::string parse_error(std::string_view text) {
  return error_of([&] { GenerationConfig::from_json(text, "g.json"); });
}

std::string validation_error(const std::function<void(GenerationConfig&)>& change) {
  GenerationConfig config;
  change(config);
  return error_of([&] { config.validate(); });
}

}  // namespace

TEST(GenerationConfig, ReadsWhatIsSetAndKeepsTheOtherDefaults) {
  const auto config = GenerationConfig::from_json(
      R"({"_from_model_config": true, "do_sample": true, "temperature": 1, "top_p": 0.9, "top_k": null,
          "eos_token_id": [1, 2], "pad_token_id": 0, "early_stopping": "never", "stop_strings": "end",
          "max_new_tokens": 7, "transformers_version": "5.17.0", "unknown": {"a": [1]}})",
      "g.json");
  EXPECT_TRUE(config.do_sample);
  EXPECT_EQ(config.temperature, 1.0);
  EXPECT_EQ(config.top_p, 0.9);
  EXPECT_EQ(config.top_k, 50);
  EXPECT_THAT(config.eos_token_id.value(), ElementsAre(1, 2));
  EXPECT_EQ(config.pad_token_id, 0);
  EXPECT_EQ(config.early_stopping, EarlyStopping::kNever);
  EXPECT_THAT(config.stop_strings, ElementsAre("end"));
  EXPECT_EQ(config.max_new_tokens, 7);
  EXPECT_EQ(config.num_beams, 1);
  EXPECT_FALSE(config.min_p.has_value());
  EXPECT_NO_THROW(config.validate());
}

TEST(GenerationConfig, TakesOneEndOfSequenceIdOrSeveral) {
  EXPECT_THAT(GenerationConfig::from_json(R"({"eos_token_id": 5})", "g").eos_token_id.value(),
              ElementsAre(5));
  EXPECT_FALSE(
      GenerationConfig::from_json(R"({"eos_token_id": null})", "g").eos_token_id.has_value());
}

TEST(GenerationConfig, WrongTypesNameTheKeyAndTheValue) {
  EXPECT_EQ(parse_error(R"({"temperature": "hot"})"),
            "g.json: key 'temperature': must be a number, got \"hot\"");
  EXPECT_EQ(parse_error(R"({"top_k": 5.5})"), "g.json: key 'top_k': must be an integer, got 5.5");
  EXPECT_EQ(parse_error(R"({"top_k": 18446744073709551615})"),
            "g.json: key 'top_k': must be an integer, got 18446744073709551615");
  EXPECT_EQ(parse_error(R"({"eos_token_id": [1, true]})"),
            "g.json: key 'eos_token_id': must be a 32-bit integer, got [1,true]");
  EXPECT_EQ(parse_error(R"({"pad_token_id": 4294967296})"),
            "g.json: key 'pad_token_id': must be a 32-bit integer, got 4294967296");
  EXPECT_EQ(parse_error(R"({"do_sample": 1})"),
            "g.json: key 'do_sample': must be true or false, got 1");
  EXPECT_EQ(parse_error(R"({"early_stopping": "soon"})"),
            "g.json: key 'early_stopping': must be true, false or \"never\", got \"soon\"");
  EXPECT_EQ(parse_error(R"({"stop_strings": [1]})"),
            "g.json: key 'stop_strings': must be a string, got [1]");
  EXPECT_EQ(parse_error("[]"), "g.json: must be a JSON object");
}

TEST(GenerationConfig, WhatIsNotJsonIsRefusedInOneLine) {
  for (const char* text : {"", "{\"top_k\": }", "{\"top_p\": 1e999}", "{\"\xff\": 1}"}) {
    const std::string error = parse_error(text);
    EXPECT_THAT(error, testing::StartsWith("g.json")) << text;
    EXPECT_EQ(error.find('\n'), std::string::npos) << text;
  }
}

TEST(GenerationConfig, LoadsFromACheckpointDirectory) {
  const auto directory = std::filesystem::path(testing::TempDir()) / "generation_config_test";
  std::filesystem::create_directories(directory);
  std::filesystem::remove(directory / "generation_config.json");
  EXPECT_EQ(GenerationConfig::load(directory.string()).top_k, 50);
  std::ofstream(directory / "generation_config.json") << R"({"top_k": 3})";
  EXPECT_EQ(GenerationConfig::load(directory.string()).top_k, 3);
  std::ofstream(directory / "generation_config.json") << R"({"top_k": "x"})";
  EXPECT_EQ(error_of([&] { GenerationConfig::load(directory.string()); }),
            (directory / "generation_config.json").string() +
                ": key 'top_k': must be an integer, got \"x\"");
  std::filesystem::remove_all(directory);
}

TEST(GenerationConfig, DefaultsAreValid) {
  EXPECT_NO_THROW(GenerationConfig().validate());
}

TEST(GenerationConfig, ValuesOutOfRangeNameOptionRangeAndValue) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(validation_error([](auto& c) { c.temperature = -1; }),
            "temperature: must be > 0 (for the likeliest token, turn do_sample off), got -1");
  EXPECT_EQ(validation_error([](auto& c) { c.max_new_tokens = 0; }),
            "max_new_tokens: must be >= 1, got 0");
  EXPECT_EQ(validation_error([](auto& c) { c.max_length = 0; }), "max_length: must be >= 1, got 0");
  EXPECT_EQ(validation_error([](auto& c) { c.min_new_tokens = -1; }),
            "min_new_tokens: must be >= 0, got -1");
  EXPECT_EQ(validation_error([](auto& c) { c.max_new_tokens = 3, c.min_new_tokens = 4; }),
            "min_new_tokens: must be at most max_new_tokens (3), got 4");
  EXPECT_EQ(validation_error([](auto& c) { c.top_k = -5; }), "top_k: must be >= 0, got -5");
  EXPECT_EQ(validation_error([](auto& c) { c.top_p = 1.5; }), "top_p: must be in [0, 1], got 1.5");
  EXPECT_EQ(validation_error([](auto& c) { c.top_p = kNaN; }), "top_p: must be in [0, 1], got nan");
  EXPECT_EQ(validation_error([](auto& c) { c.min_p = -0.5; }),
            "min_p: must be in [0, 1], got -0.5");
  EXPECT_EQ(validation_error([](auto& c) { c.typical_p = 0; }),
            "typical_p: must be in (0, 1], got 0");
  EXPECT_EQ(validation_error([](auto& c) { c.epsilon_cutoff = 1; }),
            "epsilon_cutoff: must be in [0, 1), got 1");
  EXPECT_EQ(validation_error([](auto& c) { c.eta_cutoff = -1; }),
            "eta_cutoff: must be in [0, 1), got -1");
  EXPECT_EQ(validation_error([](auto& c) { c.repetition_penalty = 0; }),
            "repetition_penalty: must be > 0, got 0");
  EXPECT_EQ(validation_error([](auto& c) { c.repetition_penalty = 1e30; }),
            "repetition_penalty: must be in [1e-10, 1e10], got 1e+30");
  EXPECT_EQ(validation_error([](auto& c) { c.temperature = 1e-40; }),
            "temperature: must be >= 1e-10, got 1e-40");
  EXPECT_EQ(validation_error([](auto& c) { c.no_repeat_ngram_size = -1; }),
            "no_repeat_ngram_size: must be >= 0, got -1");
  EXPECT_EQ(validation_error([](auto& c) { c.num_beams = 0; }),
            "num_beams: must be in [1, 1024], got 0");
  EXPECT_EQ(validation_error([](auto& c) { c.length_penalty = kNaN; }),
            "length_penalty: must be finite, got nan");
  EXPECT_EQ(validation_error([](auto& c) { c.num_beams = 2, c.num_return_sequences = 3; }),
            "num_return_sequences: must be at most num_beams (2), got 3");
  EXPECT_EQ(
      validation_error([](auto& c) { c.num_return_sequences = 2; }),
      "num_return_sequences: must be 1 for greedy search (set do_sample, or num_beams > 1), got 2");
  EXPECT_EQ(validation_error([](auto& c) {
              c.eos_token_id = {3, -1};
            }),
            "eos_token_id: must be >= 0, got -1");
  EXPECT_EQ(validation_error([](auto& c) { c.stop_strings = {""}; }),
            "stop_strings: must not hold an empty string");
}

}  // namespace deltafox
