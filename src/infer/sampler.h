// Choosing the next token from a row of logits, which may hold -inf (removed tokens) but no NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "ops/token_weights.h"

namespace deltafox::infer {

// The uniform number in [0, 1), a multiple of 2^-53, that belongs to a key.
double uniform(const DrawKey& key);

// The weights of a row's tokens together; where all entries are -inf, so is the maximum.
WeightSum weight_sum(std::span<const float> x);
// The same, and each token's weight [N].
WeightSum weigh(std::span<const float> x, std::span<std::uint64_t> weights);

// x <- x - log Σ exp(x); a row of -inf stays as it is.
void log_softmax(std::span<float> x);

// log softmax(logits)_id.
float log_probability(std::span<const float> logits, std::int32_t id);

// The first index of the largest logit. Throws Error if all are -inf.
std::int32_t argmax(std::span<const float> logits);

// The first index whose running sum of weights exceeds u·Σ weights, for u in [0, 1); at least one
// weight is positive.
std::size_t sample_weights(std::span<const std::uint64_t> weights, double u);

// The index that u selects from softmax(logits): sample_weights of the tokens' weights. `weights`
// is scratch. Throws Error if all logits are -inf.
std::int32_t sample(std::span<const float> logits, double u, std::vector<std::uint64_t>& weights);

}  // namespace deltafox::infer
