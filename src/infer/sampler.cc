#include "infer/sampler.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>

#include "core/error.h"
#include "ops/choose_token.h"

namespace deltafox::infer {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

}  // namespace

double uniform(const DrawKey& key) {
  return static_cast<double>(draw_bits(key)) * 0x1p-53;
}

WeightSum weight_sum(std::span<const float> x) {
  return weigh(x, {});
}

WeightSum weigh(std::span<const float> x, std::span<std::uint64_t> weights) {
  WeightSum sum;
  for (const float value : x) sum.max = std::max(sum.max, value);
  std::fill(weights.begin(), weights.end(), 0);
  if (sum.max == kMinusInfinity) return sum;
  // Most of a filtered row is -inf, and exponentials are what takes time.
  std::array<TokenWeight, 32> block;
  for (std::size_t begin = 0; begin < x.size(); begin += block.size()) {
    const std::size_t count = std::min(block.size(), x.size() - begin);
    const float* row = x.data() + begin;
    float max = kMinusInfinity;
    for (std::size_t i = 0; i < count; ++i) max = std::max(max, row[i]);
    if (max == kMinusInfinity) continue;
    for (std::size_t i = 0; i < count; ++i) block[i] = token_weight(row[i], sum.max);
    for (std::size_t i = 0; i < count; ++i) {
      sum.weight += block[i].weight;
      sum.surprise += block[i].surprise;
    }
    if (weights.empty()) continue;
    for (std::size_t i = 0; i < count; ++i) weights[begin + i] = block[i].weight;
  }
  return sum;
}

void log_softmax(std::span<float> x) {
  const WeightSum sum = weight_sum(x);
  if (sum.max == kMinusInfinity) return;
  const double log_sum = sum.log();
  for (float& value : x) value = normalised(value, log_sum);
}

float log_probability(std::span<const float> logits, std::int32_t id) {
  return normalised(logits[static_cast<std::size_t>(id)], weight_sum(logits).log());
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
  if (max == kMinusInfinity) fail(ChosenToken::kNoneLeftMessage);
  return static_cast<std::int32_t>(best);
}

std::size_t sample_weights(std::span<const std::uint64_t> weights, double u) {
  const std::uint64_t total = std::accumulate(weights.begin(), weights.end(), std::uint64_t{0});
  const std::uint64_t target = draw_target(static_cast<std::uint64_t>(u * 0x1p53), total);
  std::uint64_t sum = 0;
  std::size_t i = 0;
  while ((sum += weights[i]) <= target) ++i;
  return i;
}

std::int32_t sample(std::span<const float> logits, double u, std::vector<std::uint64_t>& weights) {
  weights.resize(logits.size());
  if (weigh(logits, weights).weight == 0) fail(ChosenToken::kNoneLeftMessage);
  return static_cast<std::int32_t>(sample_weights(weights, u));
}

}  // namespace deltafox::infer
