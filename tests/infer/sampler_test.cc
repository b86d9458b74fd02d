#include "infer/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "deltafox/error.h"

namespace deltafox::infer {

namespace {
constexpr float kInf = std::numeric_limits<float>::infinity();
}

TEST(Sampler, UniformIsMadeOfTheFirstTwoPhiloxWords) {
  // Philox words 0 and 1 for a zero key and counter: 6627e8d5 e169c58d.
  const std::uint64_t bits = 0x6627e8d5e169c58dULL >> 11;
  EXPECT_EQ(uniform({}), std::ldexp(static_cast<double>(bits), -53));
}

TEST(Sampler, EveryPartOfTheKeyMatters) {
  const std::set<double> draws = {uniform({}),
                                  uniform({.seed = 1}),
                                  uniform({.seed = std::uint64_t{1} << 32}),
                                  uniform({.prompt = 1}),
                                  uniform({.sequence = 1}),
                                  uniform({.step = 1}),
                                  uniform({.draw = 1})};
  EXPECT_EQ(draws.size(), 7U);
}

TEST(Sampler, InvertsTheCumulativeDistributionInIndexOrder) {
  // Probabilities 1/8, 0, 1/2, 3/8.
  const std::vector<float> logits = {std::log(1.0F), -kInf, std::log(4.0F), std::log(3.0F)};
  std::vector<std::uint64_t> weights;
  EXPECT_EQ(sample(logits, 0.0, weights), 0);
  EXPECT_EQ(sample(logits, 0.1249, weights), 0);
  EXPECT_EQ(sample(logits, 0.1251, weights), 2);
  EXPECT_EQ(sample(logits, 0.6249, weights), 2);
  EXPECT_EQ(sample(logits, 0.6251, weights), 3);
  EXPECT_EQ(sample(logits, std::nextafter(1.0, 0.0), weights), 3);
}

TEST(Sampler, NeverChoosesARemovedTokenAtEitherEnd) {
  const std::vector<float> logits = {-kInf, 2.0F, -kInf};
  std::vector<std::uint64_t> weights;
  for (const double u : {0.0, 0.5, std::nextafter(1.0, 0.0)})
    EXPECT_EQ(sample(logits, u, weights), 1);
}

TEST(Sampler, DrawsFollowTheDistribution) {
  constexpr int kTokens = 40;
  constexpr int kDraws = 40000;
  std::vector<float> logits(kTokens);
  for (int i = 0; i < kTokens; ++i) {
    logits[static_cast<std::size_t>(i)] = 1.5F * std::sin(1.7F * static_cast<float>(i));
  }
  const WeightSum sum = weight_sum(logits);
  // Chi-square with 39 degrees of freedom has mean 39 and standard deviation 8.8; it exceeds 80
  // with probability 1.2e-4, and the seeds are fixed.
  for (const std::uint64_t seed : {0ULL, 1ULL, 0x9e3779b97f4a7c15ULL}) {
    std::vector<int> counts(kTokens, 0);
    std::vector<std::uint64_t> weights;
    for (std::uint32_t step = 0; step < kDraws; ++step) {
      const auto id = sample(logits, uniform({.seed = seed, .step = step}), weights);
      ++counts[static_cast<std::size_t>(id)];
    }
    double chi_square = 0.0;
    for (std::size_t i = 0; i < kTokens; ++i) {
      const double expected = kDraws * std::exp(static_cast<double>(logits[i]) - sum.log());
      chi_square += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    EXPECT_LT(chi_square, 80.0) << "seed " << seed;
    EXPECT_GT(chi_square, 12.0) << "seed " << seed;  // too even to be random: probability 5e-6
  }
}

TEST(Sampler, WeightsAreExponentialsToTheirUnit) {
  for (int i = 0; i <= 2900; ++i) {
    const auto x = -0.01F * static_cast<float>(i);
    const TokenWeight weight = token_weight(1.5F + x, 1.5F);
    const double exact = static_cast<double>(1.5F + x) - 1.5;
    if (exact < kLeastExponent) continue;
    // Half a unit of rounding, and an exponential of some units in the last place.
    const double unit = 0.5 + 0x1p-10;
    EXPECT_NEAR(static_cast<double>(weight.weight), std::exp(exact) * kWeightUnit, unit);
    EXPECT_NEAR(static_cast<double>(weight.surprise), -exact * std::exp(exact) * kWeightUnit, unit);
  }
  EXPECT_EQ(token_weight(-kInf, 0.0F).weight, 0U);
  EXPECT_EQ(token_weight(7.0F, 7.0F).weight, std::uint64_t{1} << 40);
}

TEST(Sampler, ExactExponentialsAndLogarithmsAreThoseOfTheLibraryToRounding) {
  for (int i = -4000; i <= 4000; ++i) {
    const double x = 0.01 * i;
    EXPECT_NEAR(exact_exp(x) / std::exp(x), 1.0, 4 * 0x1p-52) << x;
    EXPECT_NEAR(exact_log(std::exp(x)), x, 4 * 0x1p-52 * std::max(1.0, std::abs(x))) << x;
  }
  EXPECT_EQ(exact_exp(0.0), 1.0);
  EXPECT_EQ(exact_log(1.0), 0.0);
  EXPECT_EQ(exact_log(0.0), -std::numeric_limits<double>::infinity());
}

TEST(Sampler, TheTargetOfADrawIsTheProductRoundedDown) {
  EXPECT_EQ(draw_target(0, ~std::uint64_t{0}), 0U);
  EXPECT_EQ(draw_target(std::uint64_t{1} << 52, 7), 3U);
  const std::uint64_t last = (std::uint64_t{1} << 53) - 1;
  for (const std::uint64_t total : {std::uint64_t{1}, std::uint64_t{1} << 40, ~std::uint64_t{0}}) {
    EXPECT_LT(draw_target(last, total), total);
    EXPECT_GE(draw_target(last, total), total - 1 - (total >> 53));
  }
}

TEST(Sampler, ArgmaxTakesTheFirstOfEqualLogits) {
  EXPECT_EQ(argmax(std::vector<float>{-kInf, 1.0F, 3.0F, 3.0F}), 2);
}

TEST(Sampler, RefusesARowWithoutTokens) {
  const std::vector<float> logits(5, -kInf);
  std::vector<std::uint64_t> weights;
  EXPECT_THROW(argmax(logits), Error);
  EXPECT_THROW(sample(logits, 0.5, weights), Error);
}

TEST(Sampler, LogSoftmaxSumsToOneAndKeepsRemovedTokens) {
  std::vector<float> logits = {1000.0F, 999.0F, -kInf, -50.0F};
  log_softmax(logits);
  EXPECT_NEAR(logits[0], -std::log1p(std::exp(-1.0)), 1e-6);
  EXPECT_NEAR(logits[1], logits[0] - 1.0F, 1e-6);
  EXPECT_EQ(logits[2], -kInf);
  std::vector<float> none(3, -kInf);
  log_softmax(none);
  EXPECT_EQ(none, std::vector<float>(3, -kInf));
}

}  // namespace deltafox::infer
