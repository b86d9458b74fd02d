#include "infer/beam_search.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>

#include "infer/sampler.h"

namespace deltafox::infer {

namespace {

constexpr std::int32_t kVocab = 5;
constexpr std::int32_t kEos = 0;
constexpr float kImpossible = -std::numeric_limits<float>::infinity();
const std::vector<std::int32_t> kPrompt = {3, 1};
const std::vector<std::int32_t> kEosIds = {kEos};

// Log-probabilities that depend on all ids so far, as a language model's do.
std::vector<float> fake_log_probs(const std::vector<std::int32_t>& ids) {
  std::seed_seq seed(ids.begin(), ids.end());
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, 1.5F);
  std::vector<float> row(kVocab);
  for (float& logit : row) logit = normal(random);
  log_softmax(row);
  return row;
}

std::vector<float> rows_of(const BeamSearch& search) {
  std::vector<float> rows;
  for (const Beam& beam : search.running()) {
    const auto row = fake_log_probs(beam.ids);
    rows.insert(rows.end(), row.begin(), row.end());
  }
  return rows;
}

std::vector<Beam> run(const GenerationConfig& config, std::int64_t max_new_tokens,
                      const std::vector<std::int32_t>& eos = kEosIds) {
  BeamSearch search(config, eos, max_new_tokens, 0, kPrompt, std::nullopt);
  while (!search.done()) search.advance(rows_of(search), rows_of(search));
  return search.results();
}

struct Sequence {
  std::vector<std::int32_t> ids;
  double score;
};

// Every sequence that ends with the end-of-sequence id or at the full length, best first.
std::vector<Sequence> enumerate(std::int64_t max_new_tokens, double length_penalty) {
  std::vector<Sequence> open = {{kPrompt, 0.0}};
  std::vector<Sequence> ended;
  for (std::int64_t length = 1; length <= max_new_tokens; ++length) {
    std::vector<Sequence> next;
    for (const Sequence& sequence : open) {
      const auto row = fake_log_probs(sequence.ids);
      for (std::int32_t id = 0; id < kVocab; ++id) {
        Sequence child = sequence;
        child.ids.push_back(id);
        child.score += static_cast<double>(row[static_cast<std::size_t>(id)]);
        if (id == kEos || length == max_new_tokens) {
          child.score /= std::pow(static_cast<double>(length), length_penalty);
          ended.push_back(child);
        } else {
          next.push_back(child);
        }
      }
    }
    open = std::move(next);
  }
  std::sort(ended.begin(), ended.end(),
            [](const auto& a, const auto& b) { return a.score > b.score; });
  return ended;
}

GenerationConfig beams(std::int64_t num_beams) {
  GenerationConfig config;
  config.num_beams = num_beams;
  config.num_return_sequences = num_beams;
  return config;
}

}  // namespace

TEST(BeamSearch, WithBeamsForEverySequenceFindsTheBestOfAll) {
  for (const double length_penalty : {0.0, 0.8, 1.0, 2.0, -0.5}) {
    SCOPED_TRACE(length_penalty);
    auto config = beams(700);  // of 5 + 4·5 + 16·5 + ... sequences, at most 4^4·5 of full length
    config.early_stopping = EarlyStopping::kNever;
    config.length_penalty = length_penalty;
    config.num_return_sequences = 10;
    const auto expected = enumerate(4, length_penalty);
    const auto actual = run(config, 4);
    ASSERT_EQ(actual.size(), 10U);
    for (std::size_t i = 0; i < actual.size(); ++i) {
      EXPECT_EQ(actual[i].ids, expected[i].ids) << i;
      EXPECT_NEAR(actual[i].score, expected[i].score, 1e-5) << i;
    }
  }
}

TEST(BeamSearch, FinishReasonsTellEndOfSequenceFromLength) {
  std::set<FinishReason> reasons;
  for (const Beam& beam : run(beams(16), 4)) {
    ASSERT_TRUE(beam.finish_reason.has_value());
    EXPECT_EQ(*beam.finish_reason == FinishReason::kEos, beam.ids.back() == kEos);
    if (*beam.finish_reason == FinishReason::kLength) {
      EXPECT_EQ(beam.ids.size(), kPrompt.size() + 4);
    }
    reasons.insert(*beam.finish_reason);
  }
  EXPECT_EQ(reasons, (std::set<FinishReason>{FinishReason::kEos, FinishReason::kLength}));
}

TEST(BeamSearch, EarlyStoppingEndsSoonerAndNeverLater) {
  const auto steps = [](EarlyStopping early_stopping, double length_penalty) {
    auto config = beams(3);
    config.early_stopping = early_stopping;
    config.length_penalty = length_penalty;
    BeamSearch search(config, kEosIds, 50, 0, kPrompt, std::nullopt);
    int count = 0;
    for (; !search.done(); ++count) search.advance(rows_of(search), {});
    return count;
  };
  const int at_once = steps(EarlyStopping::kTrue, 1.0);
  const int heuristic = steps(EarlyStopping::kFalse, 1.0);
  const int never = steps(EarlyStopping::kNever, 1.0);
  EXPECT_LT(at_once, 50);
  EXPECT_LE(at_once, heuristic);
  EXPECT_LT(heuristic, never);
  // Without a reward for length, scores only fall, and both rules see the same end.
  EXPECT_EQ(steps(EarlyStopping::kFalse, 0.0), steps(EarlyStopping::kNever, 0.0));
}

TEST(BeamSearch, ScoreIsTheSumOfLogProbabilitiesOverTheLengthPenalty) {
  auto config = beams(4);
  config.length_penalty = 0.7;
  config.output_logprobs = true;
  for (const Beam& beam : run(config, 6)) {
    double sum = 0.0;
    for (const float logprob : beam.logprobs) sum += static_cast<double>(logprob);
    const auto length = static_cast<double>(beam.ids.size() - kPrompt.size());
    EXPECT_EQ(beam.logprobs.size(), beam.ids.size() - kPrompt.size());
    EXPECT_EQ(beam.model_logprobs.size(), beam.logprobs.size());
    EXPECT_NEAR(beam.score, sum / std::pow(length, 0.7), 1e-5);
  }
}

TEST(BeamSearch, ParentsLeadBackToThePrompt) {
  auto config = beams(4);
  BeamSearch search(config, kEosIds, 8, 0, kPrompt, std::nullopt);
  while (!search.done()) {
    const auto before = search.running();
    search.advance(rows_of(search), {});
    for (const Beam& beam : search.running()) {
      ASSERT_LT(beam.parent, before.size());
      const auto& parent = before[beam.parent].ids;
      EXPECT_TRUE(std::equal(parent.begin(), parent.end(), beam.ids.begin()));
      EXPECT_EQ(beam.ids.size(), parent.size() + 1);
    }
  }
}

TEST(BeamSearch, ImpossibleContinuationsAreNoBeams) {
  auto config = beams(4);
  BeamSearch search(config, kEosIds, 3, 0, kPrompt, std::nullopt);
  std::vector<float> row(kVocab, kImpossible);
  row[2] = 0.0F;
  search.advance(row, {});
  ASSERT_EQ(search.running().size(), 1U);
  EXPECT_EQ(search.running()[0].ids, (std::vector<std::int32_t>{3, 1, 2}));
  search.advance(std::vector<float>(kVocab, kImpossible), {});
  EXPECT_TRUE(search.done());
  EXPECT_TRUE(search.results().empty());
}

TEST(BeamSearch, CutShortItReturnsRunningBeamsAsCancelled) {
  auto config = beams(3);
  BeamSearch search(config, {}, 10, 0, kPrompt, std::nullopt);
  for (int step = 0; step < 4; ++step) search.advance(rows_of(search), {});
  const auto results = search.results();
  ASSERT_EQ(results.size(), 3U);
  for (const Beam& beam : results) {
    EXPECT_EQ(beam.finish_reason, FinishReason::kCancelled);
    EXPECT_EQ(beam.ids.size(), kPrompt.size() + 4);
  }
}

TEST(BeamSample, SameSeedSameBeamsAndOtherSeedsOthers) {
  auto config = beams(3);
  config.do_sample = true;
  config.seed = 7;
  const auto first = run(config, 8);
  const auto again = run(config, 8);
  ASSERT_EQ(first.size(), again.size());
  for (std::size_t i = 0; i < first.size(); ++i) EXPECT_EQ(first[i].ids, again[i].ids);
  std::set<std::vector<std::int32_t>> best;
  for (config.seed = 0; config.seed < 20; ++config.seed) best.insert(run(config, 8).front().ids);
  EXPECT_GT(best.size(), 5U);
}

TEST(BeamSample, DrawsWithoutReplacementInProportion) {
  // One step of two beams: the first two ids drawn are the sequences returned.
  auto config = beams(2);
  config.do_sample = true;
  const auto row = fake_log_probs(kPrompt);
  std::map<std::set<std::int32_t>, int> counts;
  constexpr int kDraws = 20000;
  for (config.seed = 0; config.seed < kDraws; ++config.seed) {
    std::set<std::int32_t> pair;
    for (const Beam& beam : run(config, 1, {})) pair.insert(beam.ids.back());
    ASSERT_EQ(pair.size(), 2U);
    ++counts[pair];
  }
  double chi_square = 0.0;
  for (std::int32_t a = 0; a < kVocab; ++a) {
    for (std::int32_t b = a + 1; b < kVocab; ++b) {
      const double p = std::exp(static_cast<double>(row[static_cast<std::size_t>(a)]));
      const double q = std::exp(static_cast<double>(row[static_cast<std::size_t>(b)]));
      const double expected = kDraws * (p * q / (1 - p) + q * p / (1 - q));
      const double difference = counts[{a, b}] - expected;
      chi_square += difference * difference / expected;
    }
  }
  // Nine degrees of freedom: above 30 with probability 4e-4, and the seeds are fixed.
  EXPECT_LT(chi_square, 30.0);
}

}  // namespace deltafox::infer
