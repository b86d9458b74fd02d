#include "ops/forgetting_attention.h"

#include <cmath>
#include <vector>

namespace deltafox::reference {
namespace {

// The log gates' sum of head h up to and with a position.
double gate_sum(const KvCache& cache, std::int64_t h, std::int64_t position) {
  const std::int64_t heads = cache.layout().gate_heads;
  if (heads == 0) return 0;
  const float* gates = cache.page(position / kKvPage).gates.f32();
  const std::int64_t at = h * kKvPage + position % kKvPage;
  return static_cast<double>(gates[at]) + gates[heads * kKvPage + at];
}

}  // namespace

void forgetting_attention(const ForgettingAttentionArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t dim = args.q.shape[2];
  const double scale = 1 / std::sqrt(static_cast<double>(dim));
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const KvCache& cache = *args.caches[static_cast<std::size_t>(b)];
    const std::int64_t first = cache.length() - args.sequences.length(b);
    for (std::int64_t i = first; i < cache.length(); ++i) {
      for (std::int64_t h = 0; h < heads; ++h) {
        const std::int64_t g = h / (heads / cache.layout().kv_heads);
        const std::int64_t row = (args.sequences.begin(b) + i - first) * heads + h;
        const float* q = args.q.f32() + row * dim;
        const std::int64_t begin = cache.first_visible(i);
        std::vector<double> scores;
        for (std::int64_t j = begin; j <= i; ++j) {
          const float* keys = cache.page(j / kKvPage).keys.f32() + g * dim * kKvPage;
          double score = 0;
          for (std::int64_t d = 0; d < dim; ++d) score += q[d] * keys[d * kKvPage + j % kKvPage];
          scores.push_back(score * scale + gate_sum(cache, h, i) - gate_sum(cache, h, j));
        }
        const double max = *std::max_element(scores.begin(), scores.end());
        double total = 0;
        std::vector<double> sum(static_cast<std::size_t>(dim));
        for (std::int64_t j = begin; j <= i; ++j) {
          const double weight = std::exp(scores[static_cast<std::size_t>(j - begin)] - max);
          const std::int64_t stride = cache.layout().value_stride();
          const float* v =
              cache.page(j / kKvPage).values.f32() + (g * kKvPage + j % kKvPage) * stride;
          total += weight;
          for (std::int64_t d = 0; d < dim; ++d) sum[static_cast<std::size_t>(d)] += weight * v[d];
        }
        for (std::int64_t d = 0; d < dim; ++d) {
          args.o.f32()[row * dim + d] =
              static_cast<float>(sum[static_cast<std::size_t>(d)] / total);
        }
      }
    }
  }
}

}  // namespace deltafox::reference
