// What choosing a token from logits is computed with, the same bits on the CPU and on a GPU: token
// weights as integers, whose sums do not depend on their order.
//
//   w_i = ⌊2^40 · exp(x_i − max x)⌉
//   log Σ exp(x) = max x + ln(Σ w / 2^40)
//   entropy H = ln(Σ w / 2^40) + Σ h / Σ w,  h_i = ⌊2^40 · (max x − x_i) · exp(x_i − max x)⌉
//
// where ⌊·⌉ rounds to the nearest integer, of two the even one.
// Sums of up to 2^23 of them fit 64 bits.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "core/exact_math.h"
#include "core/philox.h"

namespace deltafox {

constexpr double kWeightUnit = 0x1p40;
constexpr double kLeastExponent = -33;  // here and below both w and h are 0
constexpr std::int64_t kMostWeights = std::int64_t{1} << 23;

struct TokenWeight {
  std::uint64_t weight;    // w
  std::uint64_t surprise;  // h
};

// ⌊x⌉ of x in [0, 2^51]: where a double's last place is 1.
constexpr std::uint64_t nearest_integer(double x) {
  constexpr double kOnes = 0x1p52;
  return std::bit_cast<std::uint64_t>(x + kOnes) - std::bit_cast<std::uint64_t>(kOnes);
}

// Of a logit, which may be −∞ unlike the maximum. Without a branch, so that compilers take several
// at a time: what lies too low for exact_exp is masked by its sign.
constexpr TokenWeight token_weight(float logit, float max) {
  const double x = static_cast<double>(logit) - static_cast<double>(max);
  const std::uint64_t counts = (std::bit_cast<std::uint64_t>(x - kLeastExponent) >> 63) - 1;
  const double scaled = exact_exp(x) * kWeightUnit;
  return {nearest_integer(scaled) & counts, nearest_integer(scaled * -x) & counts};
}

// Weights of a row of logits together.
struct WeightSum {
  float max = -std::numeric_limits<float>::infinity();
  std::uint64_t weight = 0;    // Σ w
  std::uint64_t surprise = 0;  // Σ h

  constexpr double log_weight() const {
    return exact_log(static_cast<double>(weight) / kWeightUnit);
  }
  // log Σ exp(x); −∞ where no token is left.
  constexpr double log() const { return static_cast<double>(max) + log_weight(); }
  constexpr double entropy() const {
    return log_weight() + static_cast<double>(surprise) / static_cast<double>(weight);
  }
  // The least sum of weights that has `mass` of all.
  constexpr std::uint64_t part(double mass) const {
    const double exact = mass * static_cast<double>(weight);
    const auto whole = static_cast<std::uint64_t>(exact);
    return whole + (static_cast<double>(whole) < exact ? 1 : 0);
  }
};

// How surprising a token is beyond what is expected: the rank of typical_p.
constexpr float distance_from_entropy(float logit, double log_sum, double entropy) {
  const double difference = log_sum - static_cast<double>(logit) - entropy;
  return static_cast<float>(difference < 0 ? -difference : difference);
}

// The logit below which tokens are less likely than `probability`, given log Σ exp(x).
constexpr float least_logit(double log_probability, double log_sum) {
  return static_cast<float>(log_probability + log_sum);
}

// The logarithm of eta_cutoff's threshold, min(ε, √ε · exp(−entropy)).
constexpr double log_eta(double epsilon, double entropy) {
  const double log_epsilon = exact_log(epsilon);
  const double relative = 0.5 * log_epsilon - entropy;
  return relative < log_epsilon ? relative : log_epsilon;
}

constexpr float normalised(float logit, double log_sum) {
  return static_cast<float>(static_cast<double>(logit) - log_sum);
}

// Which number of the seed's stream a draw uses: one for each (seed, prompt, sequence, step, draw).
struct DrawKey {
  std::uint64_t seed = 0;
  std::uint32_t prompt = 0;    // index of the prompt
  std::uint32_t sequence = 0;  // index of the continuation among those of its prompt
  std::uint32_t step = 0;      // new tokens before this one
  std::uint32_t draw = 0;      // index of the draw within the step
};

// The number in [0, 2^53) that belongs to a key: u · 2^53.
constexpr std::uint64_t draw_bits(const DrawKey& key) {
  const PhiloxBlock words = philox4x32_10(
      {key.step, key.draw, key.sequence, key.prompt},
      {static_cast<std::uint32_t>(key.seed), static_cast<std::uint32_t>(key.seed >> 32)});
  return (std::uint64_t{words[0]} << 32 | words[1]) >> 11;
}

// ⌊u · total⌋ for u = bits / 2^53: the first token whose running sum exceeds it is the one drawn.
constexpr std::uint64_t draw_target(std::uint64_t bits, std::uint64_t total) {
  // The high half of a product of 64 bits by 64 bits.
  constexpr std::uint64_t kLow = 0xffffffff;
  const std::uint64_t a = bits << 11;
  const std::uint64_t low_high = (a & kLow) * (total >> 32);
  const std::uint64_t high_low = (a >> 32) * (total & kLow);
  const std::uint64_t carry =
      ((a & kLow) * (total & kLow) >> 32) + (low_high & kLow) + (high_low & kLow);
  return (a >> 32) * (total >> 32) + (low_high >> 32) + (high_low >> 32) + (carry >> 32);
}

}  // namespace deltafox
