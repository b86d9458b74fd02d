// Logits processors: each takes one row of N logits (or log-probabilities) and removes tokens, by
// setting them to -inf, or rescales. Definitions: transformers 5.17, generation/logits_process.py,
// of which these are the formulas written anew; sums are of integers here (ops/token_weights.h),
// of float32 there.
//
// `keep` (transformers' min_tokens_to_keep) is how many of the likeliest tokens a filter never
// removes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "deltafox/generate.h"

namespace deltafox::infer {

// A token in a ranking. What the comparison needs lies beside it, as a ranking of the whole
// vocabulary that looked it up elsewhere would take several times as long.
struct RankedToken {
  float key;
  std::int32_t id;
  std::uint64_t weight;
};

// Memory of the processors for rows of N logits, so that none allocates.
struct ProcessorScratch {
  explicit ProcessorScratch(std::size_t vocab_size)
      : ranked(vocab_size), logits(vocab_size), weights(vocab_size), seen(vocab_size, 0) {}

  std::vector<RankedToken> ranked;     // [N]
  std::vector<float> logits;           // [N] a copy to be reordered
  std::vector<std::uint64_t> weights;  // [N]
  std::vector<std::uint8_t> seen;      // [N] all zero between calls
};

// Divides positive and multiplies negative logits of the tokens in `ids` by `penalty`, once each.
void repetition_penalty(std::span<float> logits, std::span<const std::int32_t> ids, float penalty,
                        ProcessorScratch& scratch);
// Removes every token that would complete an n-gram that `ids` already holds; `size` >= 1.
void no_repeat_ngram(std::span<float> logits, std::span<const std::int32_t> ids, std::size_t size);
void remove_tokens(std::span<float> logits, std::span<const std::int32_t> tokens);
void temperature(std::span<float> logits, float value);
// Keeps the k largest logits and those equal to the smallest of them.
void top_k(std::span<float> logits, std::size_t k, ProcessorScratch& scratch);
// Keeps the fewest of the likeliest tokens whose probabilities reach p together. Of equally likely
// ones, those of higher index go first, as in transformers.
void top_p(std::span<float> logits, double p, std::size_t keep, ProcessorScratch& scratch);
// Removes tokens less likely than p times the likeliest.
void min_p(std::span<float> logits, double p, std::size_t keep, ProcessorScratch& scratch);
// Keeps the tokens whose surprise -log p_i is nearest the entropy, until their mass reaches `mass`.
void typical_p(std::span<float> logits, double mass, std::size_t keep, ProcessorScratch& scratch);
// Removes tokens less likely than epsilon.
void epsilon_cutoff(std::span<float> logits, double epsilon, std::size_t keep,
                    ProcessorScratch& scratch);
// Removes tokens less likely than min(epsilon, sqrt(epsilon)·exp(-entropy)).
void eta_cutoff(std::span<float> logits, double epsilon, std::size_t keep,
                ProcessorScratch& scratch);

// The processors that a configuration asks for, in transformers' order.
class ProcessorChain {
 public:
  // `config` is valid; `eos_token_ids` are the ones in force, all below `vocab_size`.
  ProcessorChain(const GenerationConfig& config, std::vector<std::int32_t> eos_token_ids,
                 std::size_t vocab_size);

  // `ids`: the prompt and what was generated after it.
  void apply(std::span<float> logits, std::span<const std::int32_t> ids, std::size_t prompt_size);

 private:
  GenerationConfig config_;
  std::vector<std::int32_t> eos_token_ids_;
  std::size_t keep_;
  ProcessorScratch scratch_;
};

}  // namespace deltafox::infer
