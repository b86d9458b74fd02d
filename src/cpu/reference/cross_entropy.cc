#include "ops/cross_entropy.h"

#include <algorithm>
#include <cmath>

namespace deltafox::reference {

void cross_entropy(const CrossEntropyArgs& args) {
  const std::int64_t vocab = args.logits.shape[1];
  for (std::size_t t = 0; t < args.labels.size(); ++t) {
    const float* row = args.logits.f32() + static_cast<std::int64_t>(t) * vocab;
    const float max = *std::max_element(row, row + vocab);
    double sum = 0;
    for (std::int64_t n = 0; n < vocab; ++n) sum += std::exp(static_cast<double>(row[n]) - max);
    args.loss[t] =
        args.labels[t] < 0 ? 0 : static_cast<float>(max + std::log(sum) - row[args.labels[t]]);
  }
}

void cross_entropy_backward(const CrossEntropyBackwardArgs& args) {
  const std::int64_t vocab = args.logits.shape[1];
  cross_entropy({.logits = args.logits, .labels = args.labels, .loss = args.loss});
  for (std::size_t t = 0; t < args.labels.size(); ++t) {
    float* row = args.logits.f32() + static_cast<std::int64_t>(t) * vocab;
    const double max = *std::max_element(row, row + vocab);
    double sum = 0;
    for (std::int64_t n = 0; n < vocab; ++n) sum += std::exp(row[n] - max);
    for (std::int64_t n = 0; n < vocab; ++n) {
      const double probability = std::exp(row[n] - max) / sum;
      const double d = args.scale * (probability - (n == args.labels[t] ? 1 : 0));
      row[n] = args.labels[t] < 0 ? 0 : static_cast<float>(d);
    }
  }
}

}  // namespace deltafox::reference
