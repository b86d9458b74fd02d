#include "infer/processors.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>

#include "infer/golden.h"

namespace deltafox::infer {

namespace {

constexpr float kRemoved = -std::numeric_limits<float>::infinity();

using Processor =
    std::function<void(std::span<float>, std::span<const std::int32_t>, ProcessorScratch&)>;

// By the names that logits_processors.safetensors uses.
const std::map<std::string, Processor>& golden_processors() {
  static const std::map<std::string, Processor> processors = {
      {"repetition_penalty_1.3",
       [](auto x, auto ids, auto& s) { repetition_penalty(x, ids, 1.3F, s); }},
      {"no_repeat_ngram_2", [](auto x, auto ids, auto&) { no_repeat_ngram(x, ids, 2); }},
      {"temperature_0.7", [](auto x, auto, auto&) { temperature(x, 0.7F); }},
      {"top_k_20", [](auto x, auto, auto& s) { top_k(x, 20, s); }},
      {"top_p_0.9", [](auto x, auto, auto& s) { top_p(x, 0.9, 1, s); }},
      {"min_p_0.05", [](auto x, auto, auto& s) { min_p(x, 0.05, 1, s); }},
      {"typical_p_0.8", [](auto x, auto, auto& s) { typical_p(x, 0.8, 1, s); }},
      {"epsilon_0.003", [](auto x, auto, auto& s) { epsilon_cutoff(x, 0.003, 1, s); }},
      {"eta_0.003", [](auto x, auto, auto& s) { eta_cutoff(x, 0.003, 1, s); }},
      {"chain_rep1.2_temp0.8_topk50_topp0.95",
       [](auto x, auto ids, auto&) {
         GenerationConfig config;
         config.do_sample = true;
         config.repetition_penalty = 1.2;
         config.temperature = 0.8;
         config.top_k = 50;
         config.top_p = 0.95;
         ProcessorChain(config, {}, x.size()).apply(x, ids, ids.size());
       }},
  };
  return processors;
}

std::vector<float> random_logits(std::size_t size, float scale, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, scale);
  std::vector<float> logits(size);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

// The definitions once more, as plainly as they can be said: ranks by a full sort, sums in order.
struct SlowTwin {
  explicit SlowTwin(std::span<const float> logits_in) : logits(logits_in.begin(), logits_in.end()) {
    double sum = 0.0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
    for (const float logit : logits) p.push_back(std::exp(static_cast<double>(logit)) / sum);
    for (const double probability : p) {
      if (probability > 0.0) entropy -= probability * std::log(probability);
    }
  }

  std::vector<std::size_t> ranked(
      const std::function<bool(std::size_t, std::size_t)>& before) const {
    std::vector<std::size_t> order(logits.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), before);
    return order;
  }
  std::vector<std::size_t> by_likelihood() const {
    return ranked([&](auto a, auto b) { return logits[a] > logits[b]; });
  }

  // Keeps the first of `order` that reach `mass`, and at least `keep`.
  std::vector<float> keep_mass(const std::vector<std::size_t>& order, double mass,
                               std::size_t keep) const {
    std::vector<float> kept(logits.size(), kRemoved);
    double sum = 0.0;
    for (std::size_t rank = 0; rank < order.size() && (sum < mass || rank < keep); ++rank) {
      kept[order[rank]] = logits[order[rank]];
      sum += p[order[rank]];
    }
    return kept;
  }
  std::vector<float> keep_likely(double threshold, std::size_t keep) const {
    std::vector<float> kept = logits;
    const auto order = by_likelihood();
    for (std::size_t rank = keep; rank < order.size(); ++rank) {
      if (p[order[rank]] < threshold) kept[order[rank]] = kRemoved;
    }
    return kept;
  }

  std::vector<float> logits;
  std::vector<double> p;
  double entropy = 0.0;
};

}  // namespace

TEST(Processors, EqualTransformersOnEveryGoldenCase) {
  const test::GoldenTensors golden(test::golden_path("logits_processors.safetensors"));
  const auto logits = golden.get<float>("logits");
  const auto ids = golden.get<std::int32_t>("input_ids");
  constexpr std::size_t kRows = 4;
  const std::size_t vocab_size = logits.size() / kRows;
  const std::size_t length = ids.size() / kRows;
  std::size_t cases = 0;
  for (const std::string& name : golden.names()) {
    if (name == "logits" || name == "input_ids") continue;
    SCOPED_TRACE(name);
    ASSERT_TRUE(golden_processors().contains(name));
    const auto expected = golden.get<float>(name);
    ProcessorScratch scratch(vocab_size);
    std::vector<float> actual = logits;
    for (std::size_t row = 0; row < kRows; ++row) {
      golden_processors().at(name)(std::span(actual).subspan(row * vocab_size, vocab_size),
                                   std::span(ids).subspan(row * length, length), scratch);
    }
    for (std::size_t i = 0; i < expected.size(); ++i) {
      ASSERT_EQ(actual[i] == kRemoved, expected[i] == kRemoved) << "entry " << i;
      if (expected[i] == kRemoved) continue;
      ASSERT_NEAR(actual[i], expected[i], 1e-5) << "entry " << i;
    }
    ++cases;
  }
  EXPECT_EQ(cases, golden_processors().size());
}

TEST(Processors, FiltersEqualTheirDefinitionsOnTheWholeVocabulary) {
  constexpr std::size_t kClasses = 50257;
  ProcessorScratch scratch(kClasses);
  std::uint32_t seed = 0;
  for (const float scale : {0.1F, 2.0F, 6.0F}) {
    for (const std::size_t keep : {std::size_t{1}, std::size_t{3}}) {
      SCOPED_TRACE(testing::Message() << "scale " << scale << ", keep " << keep);
      const std::vector<float> logits = random_logits(kClasses, scale, ++seed);
      const SlowTwin twin(logits);
      const auto nearness = [&](std::size_t i) {
        return std::abs(-std::log(twin.p[i]) - twin.entropy);
      };
      const auto by_nearness =
          twin.ranked([&](auto a, auto b) { return nearness(a) < nearness(b); });
      for (const double value : {0.02, 0.5, 0.95}) {
        auto row = logits;
        top_p(row, value, keep, scratch);
        EXPECT_EQ(row, twin.keep_mass(twin.by_likelihood(), value, keep)) << "top_p " << value;
        row = logits;
        min_p(row, value, keep, scratch);
        const double max_p = twin.p[twin.by_likelihood().front()];
        EXPECT_EQ(row, twin.keep_likely(value * max_p, keep)) << "min_p " << value;
        row = logits;
        typical_p(row, value, keep, scratch);
        // The ranks are compared in float32, so tokens at the border may change places.
        const auto expected = twin.keep_mass(by_nearness, value, keep);
        double border = 0.0;
        for (std::size_t i = 0; i < kClasses; ++i) {
          if (expected[i] != kRemoved) border = std::max(border, nearness(i));
        }
        for (std::size_t i = 0; i < kClasses; ++i) {
          if (row[i] == expected[i]) continue;
          ASSERT_NEAR(nearness(i), border, 1e-5) << "typical_p " << value;
        }
      }
      for (const double epsilon : {1e-5, 3e-4, 0.3}) {
        auto row = logits;
        epsilon_cutoff(row, epsilon, keep, scratch);
        EXPECT_EQ(row, twin.keep_likely(epsilon, keep)) << "epsilon " << epsilon;
        row = logits;
        eta_cutoff(row, epsilon, keep, scratch);
        const double eta = std::min(epsilon, std::sqrt(epsilon) * std::exp(-twin.entropy));
        EXPECT_EQ(row, twin.keep_likely(eta, keep)) << "eta " << epsilon;
      }
      for (const std::size_t k :
           {std::size_t{1}, std::size_t{50}, std::size_t{257}, kClasses, kClasses + 1}) {
        auto row = logits;
        top_k(row, k, scratch);
        const auto kept =
            std::count_if(row.begin(), row.end(), [](float x) { return x != kRemoved; });
        EXPECT_GE(kept, std::min<std::ptrdiff_t>(static_cast<std::ptrdiff_t>(k), kClasses));
        const float smallest_kept = logits[twin.by_likelihood()[std::min(k, kClasses) - 1]];
        for (std::size_t i = 0; i < kClasses; ++i) {
          ASSERT_EQ(row[i], logits[i] < smallest_kept ? kRemoved : logits[i]);
        }
      }
    }
  }
}

TEST(Processors, TopKKeepsAllThatTieForTheLastPlace) {
  std::vector<float> logits = {1.0F, 3.0F, 2.0F, 2.0F, 0.0F};
  ProcessorScratch scratch(logits.size());
  top_k(logits, 2, scratch);
  EXPECT_EQ(logits, (std::vector<float>{kRemoved, 3.0F, 2.0F, 2.0F, kRemoved}));
}

TEST(Processors, FiltersLeaveRemovedTokensRemovedAndAtLeastOneOther) {
  const std::vector<float> logits = {kRemoved, 0.5F, kRemoved, -0.5F, kRemoved};
  ProcessorScratch scratch(logits.size());
  const std::vector<std::function<void(std::span<float>)>> strictest = {
      [&](auto x) { top_k(x, 1, scratch); },
      [&](auto x) { top_p(x, 0.0, 1, scratch); },
      [&](auto x) { min_p(x, 1.0, 1, scratch); },
      [&](auto x) { epsilon_cutoff(x, 0.99, 1, scratch); },
      [&](auto x) { eta_cutoff(x, 0.99, 1, scratch); },
  };
  for (std::size_t i = 0; i < strictest.size(); ++i) {
    auto row = logits;
    strictest[i](row);
    EXPECT_EQ(row, (std::vector<float>{kRemoved, 0.5F, kRemoved, kRemoved, kRemoved})) << i;
  }
  auto row = logits;
  typical_p(row, 1e-9, 1, scratch);
  EXPECT_EQ(std::count(row.begin(), row.end(), kRemoved), 4);
}

TEST(Processors, SurviveARowFromWhichEverythingWasRemoved) {
  const std::vector<float> none(7, kRemoved);
  ProcessorScratch scratch(none.size());
  auto row = none;
  top_k(row, 3, scratch);
  top_p(row, 0.5, 2, scratch);
  min_p(row, 0.5, 2, scratch);
  typical_p(row, 0.5, 2, scratch);
  epsilon_cutoff(row, 0.5, 2, scratch);
  eta_cutoff(row, 0.5, 2, scratch);
  EXPECT_EQ(row, none);
}

TEST(Processors, RepetitionPenaltyCountsATokenOnce) {
  std::vector<float> logits = {2.0F, -2.0F, 1.0F, 0.0F};
  ProcessorScratch scratch(logits.size());
  for (int call = 0; call < 2; ++call) {
    repetition_penalty(logits, std::vector<std::int32_t>{0, 1, 0, 1, 0}, 2.0F, scratch);
  }
  EXPECT_EQ(logits, (std::vector<float>{0.5F, -8.0F, 1.0F, 0.0F}));
}

TEST(Processors, NoRepeatNgramBansWhatFollowedTheSamePrefix) {
  std::vector<float> logits(6, 1.0F);
  no_repeat_ngram(logits, std::vector<std::int32_t>{1, 2, 3, 1, 2, 4, 1, 2}, 3);
  EXPECT_EQ(logits, (std::vector<float>{1, 1, 1, kRemoved, kRemoved, 1}));
  std::vector<float> unigrams(4, 1.0F);
  no_repeat_ngram(unigrams, std::vector<std::int32_t>{1, 3}, 1);
  EXPECT_EQ(unigrams, (std::vector<float>{1, kRemoved, 1, kRemoved}));
  std::vector<float> too_short(3, 1.0F);
  no_repeat_ngram(too_short, std::vector<std::int32_t>{1, 1}, 3);
  EXPECT_EQ(too_short, (std::vector<float>{1, 1, 1}));
}

TEST(ProcessorChain, BansEndOfSequenceUntilBothMinimaAreReached) {
  GenerationConfig config;
  config.min_new_tokens = 2;
  config.min_length = 5;
  ProcessorChain chain(config, {1, 2}, 4);
  const auto banned = [&](std::size_t length, std::size_t prompt_size) {
    std::vector<float> logits(4, 0.5F);
    chain.apply(logits, std::vector<std::int32_t>(length, 3), prompt_size);
    EXPECT_EQ(logits[1], logits[2]);
    EXPECT_EQ(logits[0], 0.5F);
    return logits[1] == kRemoved;
  };
  EXPECT_TRUE(banned(6, 6));
  EXPECT_TRUE(banned(7, 6));
  EXPECT_FALSE(banned(8, 6));
  EXPECT_TRUE(banned(4, 1));
  EXPECT_FALSE(banned(5, 1));
}

TEST(ProcessorChain, FiltersNeedSamplingAndBeamsKeepATokenThatGoesOn) {
  const std::vector<float> logits = {4.0F, 3.0F, 2.0F, 1.0F};
  const auto kept = [&](bool do_sample, std::int64_t num_beams, std::vector<std::int32_t> eos) {
    GenerationConfig config;
    config.do_sample = do_sample;
    config.num_beams = num_beams;
    config.top_k = 1;
    config.top_p = 0.1;
    std::vector<float> row = logits;
    ProcessorChain(config, std::move(eos), row.size()).apply(row, std::vector<std::int32_t>{0}, 1);
    return std::count_if(row.begin(), row.end(), [](float x) { return x != kRemoved; });
  };
  EXPECT_EQ(kept(false, 1, {0}), 4);
  EXPECT_EQ(kept(true, 1, {0}), 1);
  EXPECT_EQ(kept(true, 2, {}), 2);
  EXPECT_EQ(kept(true, 2, {0, 1}), 3);
}

}  // namespace deltafox::infer
