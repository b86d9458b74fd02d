// Choosing the next token from a row of logits, which may hold -inf (removed tokens) but no NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace deltafox::infer {

// Which number of the seed's stream a draw uses: one for each (seed, prompt, sequence, step, draw).
struct DrawKey {
  std::uint64_t seed = 0;
  std::uint32_t prompt = 0;    // index of the prompt
  std::uint32_t sequence = 0;  // index of the continuation among those of its prompt
  std::uint32_t step = 0;      // new tokens before this one
  std::uint32_t draw = 0;      // index of the draw within the step
};

// The uniform number in [0, 1), a multiple of 2^-53, that belongs to a key.
double uniform(const DrawKey& key);

// max x and Σ exp(x - max x), so that log Σ exp(x) = max + log(sum). Where all entries are -inf, so
// is the maximum, and the sum is 0.
struct ExpSum {
  float max;
  double sum;
  double log() const;
};
ExpSum exp_sum(std::span<const float> x);

// x <- x - log Σ exp(x); a row of -inf stays as it is.
void log_softmax(std::span<float> x);

// log softmax(logits)_id.
float log_probability(std::span<const float> logits, std::int32_t id);

// The first index of the largest logit. Throws Error if all are -inf.
std::int32_t argmax(std::span<const float> logits);

// The first index whose running sum of weights exceeds u·Σ weights, for u in [0, 1); at least one
// weight is positive, none negative.
std::size_t sample_weights(std::span<const double> weights, double u);

// The index that u selects from softmax(logits): sample_weights of exp(logit - max logit).
// `weights` is scratch. Throws Error if all logits are -inf.
std::int32_t sample(std::span<const float> logits, double u, std::vector<double>& weights);

}  // namespace deltafox::infer
