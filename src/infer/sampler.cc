#include "infer/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "infer/philox.h"

namespace deltafox::infer {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

[[noreturn]] void fail_no_choice() {
  fail(
      "no token is left to choose: the options (no_repeat_ngram_size, min_new_tokens) ban every "
      "one");
}

}  // namespace

double uniform(const DrawKey& key) {
  const PhiloxBlock words = philox4x32_10(
      {key.step, key.draw, key.sequence, key.prompt},
      {static_cast<std::uint32_t>(key.seed), static_cast<std::uint32_t>(key.seed >> 32)});
  const std::uint64_t bits = (std::uint64_t{words[0]} << 32 | words[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

double ExpSum::log() const {
  return static_cast<double>(max) + std::log(sum);
}

ExpSum exp_sum(std::span<const float> x) {
  float max = kMinusInfinity;
  for (const float value : x) max = std::max(max, value);
  if (max == kMinusInfinity) return {max, 0.0};
  double sum = 0.0;
  for (const float value : x) {
    // Most of a filtered row is -inf, which adds nothing.
    if (value != kMinusInfinity) sum += static_cast<double>(std::exp(value - max));
  }
  return {max, sum};
}

void log_softmax(std::span<float> x) {
  const ExpSum sum = exp_sum(x);
  if (sum.max == kMinusInfinity) return;
  const double log_sum = sum.log();
  for (float& value : x) value = static_cast<float>(static_cast<double>(value) - log_sum);
}

float log_probability(std::span<const float> logits, std::int32_t id) {
  const auto logit = static_cast<double>(logits[static_cast<std::size_t>(id)]);
  return static_cast<float>(logit - exp_sum(logits).log());
}

std::int32_t argmax(std::span<const float> logits) {
  std::size_t best = 0;
  float max = kMinusInfinity;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > max) {
      max = logits[i];
      best = i;
    }
  }
  if (max == kMinusInfinity) fail_no_choice();
  return static_cast<std::int32_t>(best);
}

std::size_t sample_weights(std::span<const double> weights, double u) {
  double total = 0.0;
  for (const double weight : weights) total += weight;
  // The same sum again in the same order ends at `total` exactly, so that u < 1 finds an index,
  // unless u·total rounds up to total: then the last possible one is meant.
  const double target = u * total;
  double sum = 0.0;
  std::size_t chosen = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0.0) continue;
    chosen = i;
    sum += weights[i];
    if (sum > target) break;
  }
  return chosen;
}

std::int32_t sample(std::span<const float> logits, double u, std::vector<double>& weights) {
  const float max = *std::max_element(logits.begin(), logits.end());
  if (max == kMinusInfinity) fail_no_choice();
  weights.resize(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) {
    // Most of a filtered row is -inf, and exp is what takes time here.
    weights[i] = logits[i] == kMinusInfinity
                     ? 0.0
                     : std::exp(static_cast<double>(logits[i]) - static_cast<double>(max));
  }
  return static_cast<std::int32_t>(sample_weights(weights, u));
}

}  // namespace deltafox::infer
