// Generation of token ids with real models: the golden checkpoints with random weights.
#include "deltafox/generate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <set>

#include "deltafox/error.h"
#include "infer/generation.h"
#include "infer/sampler.h"
#include "support/errors.h"

namespace deltafox {

namespace {

using test::golden_model;
using test::greedy;
using test::Ids;
using test::Prompts;
using test::tiny_model;
using testing::ElementsAre;
using testing::HasSubstr;

// The golden checkpoints that hold `file` and are of an architecture that can be loaded.
std::vector<std::string> loadable_checkpoints(const std::string& file) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(test::golden_path(""))) {
    if (!std::filesystem::exists(entry.path() / file)) continue;
    try {
      Model::load(entry.path().string());
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr("model_type"));  // the only good reason not to load
      continue;
    }
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

GenerationConfig sampling(std::int64_t max_new_tokens, std::uint64_t seed = 1) {
  GenerationConfig config = greedy(max_new_tokens);
  config.do_sample = true;
  config.seed = seed;
  return config;
}

Ids new_ids(const GeneratedSequence& sequence) {
  return {sequence.new_ids().begin(), sequence.new_ids().end()};
}

std::string error_of(const Prompts& prompts, const GenerationConfig& config,
                     const GenerateOptions& options = {}) {
  return test::error_of([&] { generate(tiny_model(), prompts, config, options); });
}

const Prompts kRagged = {{17, 4, 99, 200, 31}, {5}, {8, 8, 120, 54, 3, 77, 90, 41, 11}};

}  // namespace

TEST(Generate, EqualsTransformersOnEveryGoldenCase) {
  const auto names = loadable_checkpoints("generate.json");
  EXPECT_THAT(names, testing::Contains("delta_net-tiny"));
  for (const std::string& name : names) {
    const Model model = golden_model(name);
    const auto cases =
        nlohmann::json::parse(test::read_text(test::golden_path(name + "/generate.json")));
    EXPECT_EQ(cases.size(), 7U);
    for (const auto& [key, golden] : cases.items()) {
      SCOPED_TRACE(testing::Message() << name << ": " << key);
      // A null eos_token_id is an unset one, for which both take the model's.
      const auto config = GenerationConfig::from_json(golden.at("options").dump(), key);
      const Ids ends = config.eos_token_id.value_or(model.info().eos_token_ids);
      const auto results = generate(model, golden.at("prompt").get<Prompts>(), config);
      const auto expected = golden.at("sequences").get<Prompts>();
      ASSERT_EQ(results.size(), expected.size());
      EXPECT_EQ(padded_ids(results, 0), expected);
      for (std::size_t s = 0; s < results.size(); ++s) {
        if (results[s].finish_reason == FinishReason::kEos) {
          EXPECT_THAT(ends, testing::Contains(results[s].ids.back()));
        } else {
          EXPECT_EQ(std::ssize(results[s].new_ids()), *config.max_new_tokens);
        }
        ASSERT_EQ(results[s].score.has_value(), golden.contains("sequences_scores"));
        if (results[s].score) {
          EXPECT_NEAR(*results[s].score, golden.at("sequences_scores")[s].get<double>(), 1e-4);
        }
      }
    }
  }
}

TEST(Generate, GreedyEqualsFullRecomputation) {
  const auto names = loadable_checkpoints("expected.safetensors");
  EXPECT_THAT(
      names, testing::IsSupersetOf({"delta_net-d128", "delta_net-gate-elu-sum", "delta_net-tiny"}));
  for (const std::string& name : names) {
    SCOPED_TRACE(name);
    const test::GoldenTensors golden(test::golden_path(name + "/expected.safetensors"));
    const auto prompt = golden.get<std::int32_t>("greedy.prompt");
    const auto expected = golden.get<std::int32_t>("greedy.ids");
    const Model model = golden_model(name);
    const auto config = greedy(static_cast<std::int64_t>(expected.size() - prompt.size()));
    EXPECT_EQ(generate(model, Prompts{prompt}, config)[0].ids, expected);
  }
}

TEST(Generate, SamplesTheSameForAnyBatchAndThreads) {
  GenerationConfig config = sampling(24);
  config.num_return_sequences = 3;
  config.output_logprobs = true;
  const auto together = generate(tiny_model(1), kRagged, config);
  ASSERT_EQ(together.size(), 9U);
  for (const int threads : {2, 5}) {
    const auto again = generate(tiny_model(threads), kRagged, config);
    for (std::size_t s = 0; s < 9; ++s) {
      EXPECT_EQ(again[s].ids, together[s].ids);
      EXPECT_EQ(again[s].logprobs, together[s].logprobs);
    }
  }
  for (std::size_t p = 0; p < kRagged.size(); ++p) {
    for (config.num_return_sequences = 1; config.num_return_sequences <= 3;
         ++config.num_return_sequences) {
      GenerateOptions options;
      options.first_prompt_index = static_cast<std::uint32_t>(p);
      const auto alone = generate(tiny_model(), Prompts{kRagged[p]}, config, options);
      for (std::size_t r = 0; r < alone.size(); ++r) {
        EXPECT_EQ(alone[r].ids, together[p * 3 + r].ids) << "prompt " << p << ", sequence " << r;
        EXPECT_EQ(alone[r].logprobs, together[p * 3 + r].logprobs);
      }
    }
    config.num_return_sequences = 3;
  }
}

TEST(Generate, SamplesDifferByPromptSequenceAndSeed) {
  GenerationConfig config = sampling(16);
  config.num_return_sequences = 4;
  std::set<Ids> texts;
  for (config.seed = 0; config.seed < 3; ++config.seed) {
    for (const auto& sequence : generate(tiny_model(), Prompts{{7, 8}, {7, 8}}, config)) {
      texts.insert(new_ids(sequence));
    }
  }
  EXPECT_EQ(texts.size(), 24U);
}

TEST(Generate, FirstSampledTokenFollowsTheModelsDistribution) {
  const Model model = tiny_model();
  GenerationConfig config = sampling(1);
  config.top_k = 8;
  config.num_return_sequences = 4000;
  std::map<std::int32_t, int> counts;
  std::map<std::int32_t, double> p;
  config.output_logprobs = true;
  for (const auto& sequence : generate(model, Prompts{{1, 2, 3}}, config)) {
    ++counts[sequence.ids.back()];
    p[sequence.ids.back()] = std::exp(static_cast<double>(sequence.logprobs[0]));
  }
  ASSERT_EQ(counts.size(), 8U);
  double chi_square = 0.0;
  double total = 0.0;
  for (const auto& [id, count] : counts) {
    const double expected = 4000 * p[id];
    chi_square += (count - expected) * (count - expected) / expected;
    total += p[id];
  }
  EXPECT_NEAR(total, 1.0, 1e-5);
  EXPECT_LT(chi_square, 26.0);  // seven degrees of freedom: 5e-4
}

TEST(Generate, BeamsOfAPromptDoNotDependOnTheBatch) {
  GenerationConfig config = greedy(12);
  config.num_beams = 3;
  config.num_return_sequences = 3;
  config.eos_token_id = {44, 182, 9};
  for (const bool do_sample : {false, true}) {
    config.do_sample = do_sample;
    const auto together = generate(tiny_model(), kRagged, config);
    ASSERT_EQ(together.size(), 9U);
    for (std::size_t p = 0; p < kRagged.size(); ++p) {
      GenerateOptions options;
      options.first_prompt_index = static_cast<std::uint32_t>(p);
      const auto alone = generate(tiny_model(), Prompts{kRagged[p]}, config, options);
      for (std::size_t r = 0; r < 3; ++r) {
        EXPECT_EQ(alone[r].ids, together[p * 3 + r].ids);
        EXPECT_EQ(alone[r].score, together[p * 3 + r].score);
        EXPECT_EQ(together[p * 3 + r].prompt, static_cast<std::int64_t>(p));
      }
    }
  }
}

TEST(Generate, LogProbabilitiesAreOfTheChosenTokens) {
  const Model model = tiny_model();
  for (const std::int64_t num_beams : {1, 3}) {
    SCOPED_TRACE(num_beams);
    GenerationConfig config = greedy(10);
    config.num_beams = num_beams;
    config.repetition_penalty = 1.5;
    config.output_logprobs = true;
    const auto result = generate(model, Prompts{kRagged[0]}, config)[0];
    ASSERT_EQ(result.logprobs.size(), 10U);
    // Once more over the whole sequence: row t holds the logits of what follows token t.
    State state = model.new_state();
    State* pointer = &state;
    const std::vector<std::int64_t> cu = {0, std::ssize(result.ids)};
    std::vector<std::vector<float>> rows;
    const auto vocab_size = static_cast<std::size_t>(model.info().vocab_size);
    model.logits({result.ids, cu}, {&pointer, 1},
                 [&](std::int64_t, std::int64_t count, const float* logits) {
                   for (std::int64_t i = 0; i < count; ++i, logits += vocab_size)
                     rows.emplace_back(logits, logits + vocab_size);
                 });
    for (std::size_t t = 0; t < 10; ++t) {
      const std::size_t at = static_cast<std::size_t>(result.num_prompt_ids) + t;
      EXPECT_NEAR(result.model_logprobs[t], infer::log_probability(rows[at - 1], result.ids[at]),
                  1e-4);
      EXPECT_NE(result.logprobs[t], result.model_logprobs[t]);
    }
  }
}

TEST(Generate, WithoutProcessorsBeamScoresAreSumsOfLogProbabilities) {
  GenerationConfig config = greedy(10);
  config.num_beams = 4;
  config.num_return_sequences = 4;
  config.length_penalty = 0.6;
  config.output_logprobs = true;
  for (const auto& sequence : generate(tiny_model(), kRagged, config)) {
    EXPECT_THAT(sequence.logprobs,
                testing::Pointwise(testing::FloatNear(1e-5F), sequence.model_logprobs));
    const double sum = std::accumulate(sequence.logprobs.begin(), sequence.logprobs.end(), 0.0);
    EXPECT_NEAR(*sequence.score, sum / std::pow(10, 0.6), 1e-4);
  }
}

TEST(Generate, AnyOfSeveralIdsEndsASequenceAndTheOthersGoOn) {
  const auto free_run = generate(tiny_model(), kRagged, greedy(20));
  const std::int32_t first_end = free_run[0].new_ids()[3];
  const std::int32_t second_end = free_run[2].new_ids()[6];
  GenerationConfig config = greedy(20);
  config.eos_token_id = {first_end, second_end};
  const auto results = generate(tiny_model(), kRagged, config);
  for (std::size_t s = 0; s < results.size(); ++s) {
    const auto all = new_ids(free_run[s]);
    const auto end = std::find_if(all.begin(), all.end(),
                                  [&](auto id) { return id == first_end || id == second_end; });
    EXPECT_EQ(new_ids(results[s]), Ids(all.begin(), end == all.end() ? end : end + 1));
    EXPECT_EQ(results[s].finish_reason,
              end == all.end() ? FinishReason::kLength : FinishReason::kEos);
  }
  EXPECT_EQ(results[0].finish_reason, FinishReason::kEos);
  EXPECT_EQ(results[2].finish_reason, FinishReason::kEos);
}

TEST(Generate, MinNewTokensKeepsTheEndAway) {
  const std::int32_t end = generate(tiny_model(), kRagged, greedy(1))[0].ids.back();
  GenerationConfig config = greedy(20);
  config.eos_token_id = {end};
  EXPECT_EQ(generate(tiny_model(), Prompts{kRagged[0]}, config)[0].new_ids().size(), 1U);
  config.min_new_tokens = 5;
  const auto ids = new_ids(generate(tiny_model(), Prompts{kRagged[0]}, config)[0]);
  EXPECT_GT(ids.size(), 5U);
  EXPECT_EQ(std::count(ids.begin(), ids.begin() + 5, end), 0);
}

TEST(Generate, EndsByDefaultAtTheModelsEndOfSequenceOrTwentyTokens) {
  const Model model = tiny_model();
  ASSERT_EQ(model.info().eos_token_ids, Ids{255});
  const auto results = generate(model, kRagged, {});
  for (const auto& sequence : results) {
    if (sequence.finish_reason == FinishReason::kEos) {
      EXPECT_EQ(sequence.ids.back(), 255);
    } else {
      EXPECT_EQ(sequence.new_ids().size(), 20U);
    }
  }
}

TEST(Generate, MaxLengthCountsThePromptOfEachSequence) {
  GenerationConfig config;
  config.eos_token_id.emplace();
  config.max_length = 11;
  for (const auto& sequence : generate(tiny_model(), kRagged, config))
    EXPECT_EQ(sequence.ids.size(), 11U);
  config.max_new_tokens = 3;
  for (const auto& sequence : generate(tiny_model(), kRagged, config))
    EXPECT_EQ(sequence.new_ids().size(), 3U);
}

TEST(Generate, ReportsEveryTokenInStepOrder) {
  std::vector<Ids> seen(3);
  std::vector<std::vector<float>> logprobs(3);
  std::vector<std::int64_t> order;
  GenerateOptions options;
  options.on_token = [&](const TokenEvent& event) {
    const auto s = static_cast<std::size_t>(event.sequence);
    seen[s].push_back(event.id);
    logprobs[s].push_back(event.logprob);
    order.push_back(event.sequence);
    EXPECT_EQ(event.finish_reason.has_value(), seen[s].size() == 4);
    return true;
  };
  GenerationConfig config = greedy(4);
  config.output_logprobs = true;
  const auto results = generate(tiny_model(), kRagged, config, options);
  EXPECT_THAT(order, ElementsAre(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2));
  for (std::size_t s = 0; s < 3; ++s) {
    EXPECT_EQ(seen[s], new_ids(results[s]));
    EXPECT_EQ(logprobs[s], results[s].logprobs);
  }
}

TEST(Generate, CancellingASequenceLeavesTheOthersAlone) {
  const auto free_run = generate(tiny_model(), kRagged, greedy(10));
  std::vector<int> events(3, 0);
  GenerateOptions options;
  options.on_token = [&](const TokenEvent& event) {
    return ++events[static_cast<std::size_t>(event.sequence)] < 3 || event.sequence != 1;
  };
  const auto results = generate(tiny_model(), kRagged, greedy(10), options);
  EXPECT_EQ(results[0].ids, free_run[0].ids);
  EXPECT_EQ(results[2].ids, free_run[2].ids);
  EXPECT_EQ(results[1].finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(new_ids(results[1]),
            Ids(free_run[1].new_ids().begin(), free_run[1].new_ids().begin() + 3));
  EXPECT_THAT(events, ElementsAre(10, 3, 10));
}

TEST(Generate, StopsWhenAsked) {
  for (const std::int64_t num_beams : {1, 3}) {
    SCOPED_TRACE(num_beams);
    int asked = 0;
    GenerateOptions options;
    options.should_stop = [&] { return ++asked == 4; };
    GenerationConfig config = greedy(50);
    config.num_beams = num_beams;
    const auto results = generate(tiny_model(), kRagged, config, options);
    ASSERT_EQ(results.size(), 3U);
    for (const auto& sequence : results) {
      EXPECT_EQ(sequence.finish_reason, FinishReason::kCancelled);
      EXPECT_EQ(sequence.new_ids().size(), 4U);
    }
    EXPECT_EQ(asked, 4);
  }
}

TEST(Generate, NoPromptsGiveNoSequences) {
  EXPECT_TRUE(generate(tiny_model(), {}, greedy(3)).empty());
}

TEST(Generate, WhatCannotBeServedIsRefused) {
  EXPECT_EQ(error_of({{1}, {}}, greedy(3)),
            "prompt 1 is empty: it needs at least one token, such as the BOS token");
  EXPECT_EQ(error_of({{1}, {2, 256}}, greedy(3)),
            "prompt 1: id 256 at position 1 must be in [0, 256)");
  EXPECT_EQ(error_of({{1}, {-1}}, greedy(3)), "prompt 1: id -1 at position 0 must be in [0, 256)");
  GenerationConfig config = greedy(3);
  config.eos_token_id = {256};
  EXPECT_EQ(error_of({{1}}, config), "eos_token_id: must be in [0, 256), got 256");
  config = greedy(3);
  config.temperature = -1;
  EXPECT_THAT(error_of({{1}}, config), HasSubstr("temperature: must be > 0"));
  config = greedy(3);
  config.stop_strings = {"x"};
  EXPECT_EQ(error_of({{1}}, config), "stop_strings: need a tokenizer");
  config = greedy(3);
  config.num_beams = 2;
  GenerateOptions options;
  options.on_token = [](const TokenEvent&) { return true; };
  EXPECT_EQ(error_of({{1}}, config, options),
            "num_beams: must be 1 to receive tokens as they come, got 2");
  config = {};
  config.max_length = 2;
  EXPECT_EQ(error_of({{1}, {1, 2, 3}}, config),
            "max_length: must be more than the 3 tokens of prompt 1, got 2");
}

TEST(Generate, BanningEveryTokenIsAnError) {
  Ids all(256);
  std::iota(all.begin(), all.end(), 0);
  GenerationConfig config = greedy(3);
  config.no_repeat_ngram_size = 1;
  EXPECT_THAT(error_of({all}, config), HasSubstr("no token is left to choose"));
}

TEST(Generate, RowsArePaddedWithThePadTokenElseTheEndElseZero) {
  const Model model = tiny_model();  // end of sequence 255, no pad token
  GenerationConfig config;
  EXPECT_EQ(pad_token_id(model, config), 255);
  config.eos_token_id = {7, 8};
  EXPECT_EQ(pad_token_id(model, config), 7);
  config.eos_token_id.emplace();
  EXPECT_EQ(pad_token_id(model, config), 0);
  config.pad_token_id = 3;
  EXPECT_EQ(pad_token_id(model, config), 3);
  std::vector<GeneratedSequence> sequences(2);
  sequences[0].ids = {1, 2, 5};
  sequences[1].ids = {4};
  EXPECT_THAT(padded_ids(sequences, 3), ElementsAre(Ids{1, 2, 5}, Ids{4, 3, 3}));
  EXPECT_TRUE(padded_ids({}, 3).empty());
}

TEST(Generate, FinishReasonsHaveNames) {
  EXPECT_EQ(name_of(FinishReason::kEos), "eos");
  EXPECT_EQ(name_of(FinishReason::kLength), "length");
  EXPECT_EQ(name_of(FinishReason::kStopString), "stop_string");
  EXPECT_EQ(name_of(FinishReason::kCancelled), "cancelled");
}

}  // namespace deltafox
