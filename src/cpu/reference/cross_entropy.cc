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

}  // namespace deltafox::reference
