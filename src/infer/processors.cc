#include "infer/processors.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

#include "infer/sampler.h"

namespace deltafox::infer {

namespace {

constexpr float kRemoved = -std::numeric_limits<float>::infinity();

// The k-th largest logit, or the smallest where there are fewer.
float kth_largest(std::span<const float> logits, std::size_t k, ProcessorScratch& scratch) {
  k = std::min(k, logits.size());
  if (k == 1) return *std::max_element(logits.begin(), logits.end());
  const auto copy = scratch.logits.begin();
  const auto kth = copy + static_cast<std::ptrdiff_t>(k - 1);
  constexpr std::size_t kSmall = 256;
  if (k <= kSmall) {  // a heap of the k largest is rarely touched
    std::partial_sort_copy(logits.begin(), logits.end(), copy, kth + 1, std::greater<>());
  } else {
    const auto end = std::copy(logits.begin(), logits.end(), copy);
    std::nth_element(copy, kth, end, std::greater<>());
  }
  return *kth;
}

void remove_below(std::span<float> logits, float threshold) {
  for (float& logit : logits) {
    if (logit < threshold) logit = kRemoved;
  }
}

// Removes tokens less likely than a probability, given its logarithm, except the `keep` likeliest.
void remove_unlikely(std::span<float> logits, double log_probability, double log_sum,
                     std::size_t keep, ProcessorScratch& scratch) {
  const float threshold = least_logit(log_probability, log_sum);
  remove_below(logits, std::min(threshold, kth_largest(logits, keep, scratch)));
}

// The tokens not yet removed, with key(logit) to rank them by and scratch.weights, in index order.
template <typename Key>
std::span<RankedToken> gather_tokens(std::span<const float> logits, Key key,
                                     ProcessorScratch& scratch) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] == kRemoved) continue;
    scratch.ranked[count++] = {key(logits[i]), static_cast<std::int32_t>(i), scratch.weights[i]};
  }
  return std::span(scratch.ranked).first(count);
}

// Puts the fewest tokens first whose weights, taken in the order `before`, reach `mass` together,
// but at least `keep`, and returns how many they are. A selection by weight: in linear
// time, as the interval that holds the last of them halves.
template <typename Before>
std::size_t select_mass(std::span<RankedToken> tokens, std::uint64_t mass, std::size_t keep,
                        Before before) {
  const auto at = [&](std::size_t i) { return tokens.begin() + static_cast<std::ptrdiff_t>(i); };
  std::size_t low = 0;
  std::size_t high = tokens.size();
  std::uint64_t taken = 0;
  while (high - low > 1) {
    const std::size_t middle = low + (high - low) / 2;
    std::nth_element(at(low), at(middle), at(high), before);
    std::uint64_t upper = 0;
    for (const RankedToken& token : tokens.subspan(low, middle - low)) upper += token.weight;
    if (taken + upper >= mass) {
      high = middle;
    } else {
      taken += upper;
      low = middle;
    }
  }
  keep = std::min(keep, tokens.size());
  if (high >= keep) return high;
  std::nth_element(tokens.begin(), at(keep - 1), tokens.end(), before);
  return keep;
}

}  // namespace

void repetition_penalty(std::span<float> logits, std::span<const std::int32_t> ids, float penalty,
                        ProcessorScratch& scratch) {
  for (const std::int32_t id : ids) {
    const auto i = static_cast<std::size_t>(id);
    if (std::exchange(scratch.seen[i], 1) != 0) continue;
    logits[i] = logits[i] < 0 ? logits[i] * penalty : logits[i] / penalty;
  }
  for (const std::int32_t id : ids) scratch.seen[static_cast<std::size_t>(id)] = 0;
}

void no_repeat_ngram(std::span<float> logits, std::span<const std::int32_t> ids, std::size_t size) {
  if (ids.size() < size) return;
  const auto prefix = ids.last(size - 1);
  for (std::size_t start = 0; start + size <= ids.size(); ++start) {
    if (std::equal(prefix.begin(), prefix.end(),
                   ids.begin() + static_cast<std::ptrdiff_t>(start))) {
      logits[static_cast<std::size_t>(ids[start + size - 1])] = kRemoved;
    }
  }
}

void remove_tokens(std::span<float> logits, std::span<const std::int32_t> tokens) {
  for (const std::int32_t token : tokens) logits[static_cast<std::size_t>(token)] = kRemoved;
}

void temperature(std::span<float> logits, float value) {
  for (float& logit : logits) logit /= value;
}

void top_k(std::span<float> logits, std::size_t k, ProcessorScratch& scratch) {
  remove_below(logits, kth_largest(logits, k, scratch));
}

void top_p(std::span<float> logits, double p, std::size_t keep, ProcessorScratch& scratch) {
  const auto key = [](float logit) { return logit; };
  const WeightSum sum = weigh(logits, scratch.weights);
  const auto tokens = gather_tokens(logits, key, scratch);
  const auto likelier = [](const RankedToken& a, const RankedToken& b) {
    return a.key != b.key ? a.key > b.key : a.id > b.id;
  };
  const std::size_t count = select_mass(tokens, sum.part(p), keep, likelier);
  for (const RankedToken& token : tokens.subspan(count)) {
    logits[static_cast<std::size_t>(token.id)] = kRemoved;
  }
}

void min_p(std::span<float> logits, double p, std::size_t keep, ProcessorScratch& scratch) {
  const float max = *std::max_element(logits.begin(), logits.end());
  remove_unlikely(logits, exact_log(p), max, keep, scratch);
}

void typical_p(std::span<float> logits, double mass, std::size_t keep, ProcessorScratch& scratch) {
  const WeightSum sum = weigh(logits, scratch.weights);
  if (sum.weight == 0) return;
  const double log_sum = sum.log();
  const double entropy = sum.entropy();
  const auto distance = [&](float logit) { return distance_from_entropy(logit, log_sum, entropy); };
  const auto tokens = gather_tokens(logits, distance, scratch);
  const auto nearer = [](const RankedToken& a, const RankedToken& b) {
    return a.key != b.key ? a.key < b.key : a.id < b.id;
  };
  const std::size_t count = select_mass(tokens, sum.part(mass), keep, nearer);
  // Tokens as far from the entropy as the farthest that was needed stay too.
  float farthest = 0.0F;
  for (const RankedToken& token : tokens.first(count)) farthest = std::max(farthest, token.key);
  for (const RankedToken& token : tokens.subspan(count)) {
    if (token.key > farthest) logits[static_cast<std::size_t>(token.id)] = kRemoved;
  }
}

void epsilon_cutoff(std::span<float> logits, double epsilon, std::size_t keep,
                    ProcessorScratch& scratch) {
  remove_unlikely(logits, exact_log(epsilon), weight_sum(logits).log(), keep, scratch);
}

void eta_cutoff(std::span<float> logits, double epsilon, std::size_t keep,
                ProcessorScratch& scratch) {
  const WeightSum sum = weight_sum(logits);
  if (sum.weight == 0) return;
  remove_unlikely(logits, log_eta(epsilon, sum.entropy()), sum.log(), keep, scratch);
}

ProcessorChain::ProcessorChain(const GenerationConfig& config,
                               std::vector<std::int32_t> eos_token_ids, std::size_t vocab_size)
    : config_(config),
      eos_token_ids_(std::move(eos_token_ids)),
      // A beam must be able to go on when all end-of-sequence tokens are among its likeliest.
      keep_(config.num_beams == 1 ? 1 : std::max<std::size_t>(2, eos_token_ids_.size() + 1)),
      scratch_(vocab_size) {}

void ProcessorChain::apply(std::span<float> logits, std::span<const std::int32_t> ids,
                           std::size_t prompt_size) {
  const GenerationConfig& c = config_;
  if (c.repetition_penalty != 1.0) {
    repetition_penalty(logits, ids, static_cast<float>(c.repetition_penalty), scratch_);
  }
  if (c.no_repeat_ngram_size > 0) {
    no_repeat_ngram(logits, ids, static_cast<std::size_t>(c.no_repeat_ngram_size));
  }
  if (std::cmp_less(ids.size(), c.min_length) ||
      std::cmp_less(ids.size() - prompt_size, c.min_new_tokens)) {
    remove_tokens(logits, eos_token_ids_);
  }
  if (c.do_sample) {
    if (c.temperature != 1.0) temperature(logits, static_cast<float>(c.temperature));
    if (c.top_k > 0) top_k(logits, std::max(static_cast<std::size_t>(c.top_k), keep_), scratch_);
    if (c.top_p < 1.0) top_p(logits, c.top_p, keep_, scratch_);
    if (c.min_p) min_p(logits, *c.min_p, keep_, scratch_);
    if (c.typical_p < 1.0) typical_p(logits, c.typical_p, keep_, scratch_);
    if (c.epsilon_cutoff > 0.0) epsilon_cutoff(logits, c.epsilon_cutoff, keep_, scratch_);
    if (c.eta_cutoff > 0.0) eta_cutoff(logits, c.eta_cutoff, keep_, scratch_);
  }
  if (c.renormalize_logits) log_softmax(logits);
}

}  // namespace deltafox::infer
