// Decoding on the GPU: what is equal to the bit in batches of the same bucket, recorded steps, and
// generation with the tokens chosen there.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "deltafox/generate.h"
#include "infer/processors.h"
#include "infer/sampler.h"
#include "model/init.h"
#include "model/registry.h"
#include "support/golden.h"
#include "support/temporary.h"

namespace deltafox {
namespace {

using test::Golden;
using Ids = std::vector<std::int32_t>;

std::string name_of_case(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return c == '-' || c == '/'; }, '_');
  return name;
}

// More steps than one recording has room for, from different positions: chosen as steps choose, and
// leaving the states that steps leave.
void expect_recorded_steps_to_equal_steps(const Model& model, DType dtype, const Ids& tokens) {
  constexpr std::int64_t kSteps = 300;
  const auto vocab = static_cast<std::size_t>(model.info().vocab_size);
  std::vector<State> states(3, model.new_state());
  for (std::size_t b = 1; b < states.size(); ++b) {
    State* state = &states[b];
    const std::array<std::int64_t, 2> all{0, static_cast<std::int64_t>(b * 7)};
    model.forward({std::span(tokens).first(b * 7), all}, {&state, 1}, {});
  }
  std::vector<State> forks = states;
  Ids ids{tokens[0], tokens[1], tokens[2]};
  std::vector<Ids> chosen;
  model.greedy(ids, test::pointers(states), kSteps,
               [&](std::int64_t, std::span<const std::int32_t> next) {
                 chosen.emplace_back(next.begin(), next.end());
               });
  ASSERT_EQ(std::ssize(chosen), kSteps);
  std::vector<float> logits(states.size() * vocab);
  for (const Ids& next : chosen) {
    model.step(ids, test::pointers(forks), logits);
    for (std::size_t b = 0; b < forks.size(); ++b) {
      const auto row = std::span(logits).subspan(b * vocab, vocab);
      const float max = *std::max_element(row.begin(), row.end());
      // The head's product and norm may be fused, which rounds in other places.
      const float slack = dtype == DType::kF32 ? 0 : 0x1p-6F * std::max(1.0F, std::abs(max));
      ASSERT_GE(row[static_cast<std::size_t>(next[b])], max - slack);
    }
    ids = next;
  }
  std::vector<float> expected(logits.size());
  model.step(ids, test::pointers(forks), expected);
  model.step(ids, test::pointers(states), logits);
  EXPECT_EQ(logits, expected);
  for (std::size_t b = 0; b < states.size(); ++b) {
    EXPECT_EQ(states[b].position(), forks[b].position());
    EXPECT_EQ(states[b].bytes(), forks[b].bytes());
  }
}

// Two layers as wide as the 760M models', so that products and mixers take the ways that they take
// there; or "/narrow", with a sixth of the heads, the least that takes the ways of few rows.
class CudaPresetDecoding : public testing::TestWithParam<std::string> {
 protected:
  static constexpr std::int64_t kVocab = 2000;

  static bool is(const char* variant) { return GetParam().find(variant) != std::string::npos; }
  void SetUp() override {
    auto config = nlohmann::json::parse(preset_config(GetParam().substr(0, GetParam().find('/'))));
    config["num_hidden_layers"] = 2;
    config["vocab_size"] = kVocab;
    if (is("/window")) config["window_size"] = 40;
    if (is("/narrow")) {
      config["hidden_size"] = 256;
      nlohmann::json& heads = (config.contains("attn") ? config["attn"] : config)["num_heads"];
      if (heads.is_number()) heads = heads.get<int>() / 6;
    }
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) config[key] = 0;
    write_initialised(config.dump(), directory_.path("model"),
                      {.seed = 3, .dtype = DType::kBF16, .threads = 4, .on_progress = {}});
  }
  Model load(DType dtype) const {
    return Model::load(directory_.path("model"),
                       {.dtype = dtype, .threads = 4, .device = Device::kCuda});
  }
  static Ids tokens(std::size_t count) {
    Ids ids;
    for (std::size_t t = 0; t < count; ++t) {
      ids.push_back(static_cast<std::int32_t>((t * t * 31 + t * 7 + 5) % kVocab));
    }
    return ids;
  }

  test::TemporaryDirectory directory_;
};

// Logits of `count` sequences from `first` on, after each of three steps.
std::vector<std::vector<float>> steps_of(const Model& model, std::size_t first, std::size_t count) {
  const auto vocab = static_cast<std::size_t>(model.info().vocab_size);
  std::vector<State> states(count, model.new_state());
  std::vector<std::vector<float>> all;
  for (std::size_t t = 0; t < 3; ++t) {
    Ids ids;
    for (std::size_t b = first; b < first + count; ++b) {
      ids.push_back(static_cast<std::int32_t>((b * 131 + t * 17 + 1) % vocab));
    }
    all.emplace_back(count * vocab);
    model.step(ids, test::pointers(states), all.back());
  }
  return all;
}

TEST_P(CudaPresetDecoding, ASequenceGetsTheSameInEveryBatchOfABucket) {
  for (const DType dtype : {DType::kBF16, DType::kF32, DType::kQ8}) {
    const Model model = load(dtype);
    const auto vocab = static_cast<std::size_t>(model.info().vocab_size);
    std::size_t smallest = 1;
    for (const std::size_t largest : {16, 32, 64, 128, 256}) {
      SCOPED_TRACE(testing::Message()
                   << name_of(dtype) << ", batches of " << smallest << " to " << largest);
      const auto all = steps_of(model, 0, largest);
      for (const std::size_t count : {smallest, largest - largest / 4}) {
        const std::size_t first = largest - count;  // in another place of the batch
        const auto some = steps_of(model, first, count);
        for (std::size_t t = 0; t < all.size(); ++t) {
          ASSERT_TRUE(std::equal(some[t].begin(), some[t].end(),
                                 all[t].begin() + static_cast<std::ptrdiff_t>(first * vocab)))
              << count << " sequences, step " << t;
        }
      }
      smallest = largest + 1;
    }
  }
}

double relative_error(std::span<const float> got, std::span<const float> expected) {
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - expected[i], 2);
    norm += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(error / norm);
}

std::vector<float> logits_of(const Model& model, const Ids& ids) {
  std::vector<State> states(1, model.new_state());
  return test::logits(model, {ids}, states);
}

// Against the same weights in float32, steps are off by no more than reading all at once, which
// rounds about as often: twice leaves room for chance.
TEST_P(CudaPresetDecoding, StepsAreAsExactAsReadingAllAtOnce) {
  const Ids ids = tokens(is("/narrow") ? 70 : 150);  // pages of a cache
  const std::vector<float> exact = logits_of(load(DType::kF32), ids);
  for (const DType dtype : {DType::kBF16, DType::kQ8, DType::kQ4}) {
    SCOPED_TRACE(name_of(dtype));
    const Model model = load(dtype);
    const std::vector<float> whole = logits_of(model, ids);
    State state = model.new_state();
    State* pointer = &state;
    std::vector<float> steps;
    std::vector<float> row(kVocab);
    for (const std::int32_t id : ids) {
      model.step({&id, 1}, {&pointer, 1}, row);
      steps.insert(steps.end(), row.begin(), row.end());
    }
    EXPECT_LE(relative_error(steps, exact), 2 * relative_error(whole, exact));
  }
}

TEST_P(CudaPresetDecoding, RecordedStepsLeaveTheStatesThatStepsLeave) {
  expect_recorded_steps_to_equal_steps(load(DType::kBF16), DType::kBF16, tokens(20));
}

INSTANTIATE_TEST_SUITE_P(Presets, CudaPresetDecoding,
                         testing::Values("delta_net-760m", "fox_pro-760m", "fox_llama-760m",
                                         "transformer_pro-760m", "transformer_llama-760m",
                                         "transformer_llama-760m/window", "mamba2-760m",
                                         "hgrn2-760m", "samba-760m"),
                         name_of_case);
INSTANTIATE_TEST_SUITE_P(Narrow, CudaPresetDecoding,
                         testing::Values("delta_net-760m/narrow", "fox_pro-760m/narrow",
                                         "transformer_llama-760m/window/narrow",
                                         "mamba2-760m/narrow", "hgrn2-760m/narrow",
                                         "samba-760m/narrow"),
                         name_of_case);

class CudaDecoding : public testing::TestWithParam<std::string> {
 protected:
  Model load(DType dtype) const {
    return Model::load(golden_.directory(),
                       {.dtype = dtype, .threads = 1, .device = Device::kCuda});
  }
  Golden golden_{GetParam()};
  std::vector<Ids> rows_ = golden_.rows("input_ids");
};

TEST_P(CudaDecoding, RecordedStepsLeaveTheStatesThatStepsLeave) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    SCOPED_TRACE(name_of(dtype));
    expect_recorded_steps_to_equal_steps(load(dtype), dtype, rows_[0]);
  }
}

TEST_P(CudaDecoding, GenerationIsTheCpusChoiceAmongTheSameLogits) {
  const Model model = load(DType::kF32);
  const auto vocab = static_cast<std::size_t>(model.info().vocab_size);
  const std::vector<Ids> prompts{{rows_[0].begin(), rows_[0].begin() + 5},
                                 {rows_[0].begin() + 3, rows_[0].begin() + 4},
                                 {rows_[0].begin() + 1, rows_[0].begin() + 12}};
  GenerationConfig config;
  config.do_sample = true;
  config.max_new_tokens = 40;
  config.num_return_sequences = 2;
  config.temperature = 0.9;
  config.top_k = 60;
  config.top_p = 0.95;
  config.repetition_penalty = 1.1;
  config.no_repeat_ngram_size = 2;
  config.min_new_tokens = 2;
  config.seed = 7;
  config.output_logprobs = true;
  Ids ends(vocab / 16);
  std::iota(ends.begin(), ends.end(), 0);
  config.eos_token_id = ends;  // so that sequences end at different steps
  GenerateOptions options;
  options.return_states = true;
  const auto results = generate(model, prompts, config, options);
  options.return_states = false;
  const auto again = generate(model, prompts, config, options);
  ASSERT_EQ(results.size(), 6U);

  std::vector<State> read(prompts.size(), model.new_state());
  std::vector<float> first(prompts.size() * vocab);
  model.forward(test::Packed(prompts).batch(), test::pointers(read), first);
  infer::ProcessorChain chain(config, ends, vocab);
  std::vector<std::uint64_t> weights;
  for (std::size_t s = 0; s < results.size(); ++s) {
    SCOPED_TRACE(testing::Message() << "sequence " << s);
    const std::size_t p = s / 2;
    State state = read[p];
    State* pointer = &state;
    Ids ids = prompts[p];
    std::vector<float> row(first.begin() + static_cast<std::ptrdiff_t>(p * vocab),
                           first.begin() + static_cast<std::ptrdiff_t>((p + 1) * vocab));
    std::vector<float> logprobs;
    std::vector<float> model_logprobs;
    bool ended = false;
    while (!ended) {
      const std::vector<float> model_row = row;
      chain.apply(row, ids, prompts[p].size());
      const DrawKey key{.seed = 7,
                        .prompt = static_cast<std::uint32_t>(p),
                        .sequence = static_cast<std::uint32_t>(s % 2),
                        .step = static_cast<std::uint32_t>(ids.size() - prompts[p].size())};
      ids.push_back(infer::sample(row, infer::uniform(key), weights));
      logprobs.push_back(infer::log_probability(row, ids.back()));
      model_logprobs.push_back(infer::log_probability(model_row, ids.back()));
      ended = std::find(ends.begin(), ends.end(), ids.back()) != ends.end() ||
              ids.size() == prompts[p].size() + 40;
      model.step({&ids.back(), 1}, {&pointer, 1}, row);
    }
    EXPECT_EQ(results[s].ids, ids);
    EXPECT_EQ(results[s].logprobs, logprobs);
    EXPECT_EQ(results[s].model_logprobs, model_logprobs);
    EXPECT_EQ(again[s].ids, ids);
    EXPECT_EQ(again[s].logprobs, logprobs);
    // The state that comes back has read all of it.
    State returned = results[s].state.value();
    EXPECT_EQ(returned.position(), state.position());
    pointer = &returned;
    std::vector<float> next(vocab);
    model.step({ids.data(), 1}, {&pointer, 1}, next);
    pointer = &state;
    model.step({ids.data(), 1}, {&pointer, 1}, row);
    EXPECT_EQ(next, row);
  }
}

TEST_P(CudaDecoding, CallersCanCancelAndStop) {
  const Model model = load(DType::kBF16);
  GenerationConfig config;
  config.max_new_tokens = 12;
  config.eos_token_id = Ids{};
  const std::vector<Ids> prompts{{rows_[0][0]}, {rows_[0][1]}};
  const auto whole = generate(model, prompts, config);
  GenerateOptions options;
  options.on_token = [&](const TokenEvent& event) {
    return event.sequence != 1 || event.id != whole[1].ids[3];
  };
  const auto cancelled = generate(model, prompts, config, options);
  EXPECT_EQ(cancelled[0].ids, whole[0].ids);
  EXPECT_EQ(cancelled[1].finish_reason, FinishReason::kCancelled);
  EXPECT_LE(cancelled[1].ids.size(), 4U);
  int asked = 0;
  options.on_token = {};
  options.should_stop = [&] { return ++asked > 5; };
  const auto stopped = generate(model, prompts, config, options);
  for (std::size_t b = 0; b < prompts.size(); ++b) {
    EXPECT_EQ(stopped[b].ids, Ids(whole[b].ids.begin(), whole[b].ids.begin() + 7));
    EXPECT_EQ(stopped[b].finish_reason, FinishReason::kCancelled);
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, CudaDecoding, testing::ValuesIn(Golden::cases()), name_of_case);

}  // namespace
}  // namespace deltafox
