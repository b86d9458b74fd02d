#include "ops/forgetting_attention.h"

#include <algorithm>
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
        if (args.lse.data != nullptr) {
          args.lse.f32()[row] = static_cast<float>(max + std::log(total));
        }
      }
    }
  }
}

void forgetting_attention_backward(const ForgettingAttentionBackwardArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t dim = args.q.shape[2];
  const std::int64_t kv_heads = args.k.shape[1];
  const double scale = 1 / std::sqrt(static_cast<double>(dim));
  std::vector<double> dk(static_cast<std::size_t>(args.k.shape.size()));
  std::vector<double> dv(dk.size());
  for (std::int64_t task = 0; task < args.sequences.count() * heads; ++task) {
    const std::int64_t b = task / heads;
    const std::int64_t h = task % heads;
    const std::int64_t begin = args.sequences.begin(b);
    const std::int64_t length = args.sequences.length(b);
    const std::int64_t g = h / (heads / kv_heads);
    const auto query = [&](std::int64_t i) { return ((begin + i) * heads + h) * dim; };
    const auto key = [&](std::int64_t j) { return ((begin + j) * kv_heads + g) * dim; };
    const auto dot = [&](const float* x, const float* y) {
      double sum = 0;
      for (std::int64_t d = 0; d < dim; ++d) sum += static_cast<double>(x[d]) * y[d];
      return sum;
    };
    std::vector<double> sums{0};  // of the log gates before each position, and at the end
    for (std::int64_t i = 0; args.log_gates.data != nullptr && i < length; ++i) {
      sums.push_back(sums.back() + args.log_gates.f32()[(begin + i) * heads + h]);
    }
    std::vector<double> dsums(static_cast<std::size_t>(length) + 1);
    for (std::int64_t i = 0; i < length; ++i) {
      const std::int64_t first = args.window ? std::max<std::int64_t>(0, i + 1 - *args.window) : 0;
      std::vector<double> weights;
      std::vector<double> dweights;
      for (std::int64_t j = first; j <= i; ++j) {
        double score = dot(args.q.f32() + query(i), args.k.f32() + key(j)) * scale;
        if (sums.size() > 1) {
          score += sums[static_cast<std::size_t>(i) + 1] - sums[static_cast<std::size_t>(j) + 1];
        }
        weights.push_back(score);
        dweights.push_back(dot(args.d_o.f32() + query(i), args.v.f32() + key(j)));
      }
      const double max = *std::max_element(weights.begin(), weights.end());
      double total = 0;
      for (double& weight : weights) total += weight = std::exp(weight - max);
      double mean = 0;
      for (std::size_t j = 0; j < weights.size(); ++j) {
        weights[j] /= total;
        mean += weights[j] * dweights[j];
      }
      std::vector<double> dq(static_cast<std::size_t>(dim));
      for (std::int64_t j = first; j <= i; ++j) {
        const double weight = weights[static_cast<std::size_t>(j - first)];
        const double ds = weight * (dweights[static_cast<std::size_t>(j - first)] - mean);
        for (std::int64_t d = 0; d < dim; ++d) {
          const auto at = static_cast<std::size_t>(key(j) + d);
          dq[static_cast<std::size_t>(d)] += ds * scale * args.k.f32()[at];
          dk[at] += ds * scale * args.q.f32()[query(i) + d];
          dv[at] += weight * args.d_o.f32()[query(i) + d];
        }
        dsums[static_cast<std::size_t>(i)] += ds;
        dsums[static_cast<std::size_t>(j)] -= ds;
      }
      for (std::int64_t d = 0; d < dim; ++d) {
        args.dq.f32()[query(i) + d] = static_cast<float>(dq[static_cast<std::size_t>(d)]);
      }
    }
    double later = 0;
    for (std::int64_t i = length - 1; args.log_gates.data != nullptr && i >= 0; --i) {
      later += dsums[static_cast<std::size_t>(i)];
      args.dlog_gates.f32()[(begin + i) * heads + h] = static_cast<float>(later);
    }
  }
  for (std::size_t i = 0; i < dk.size(); ++i) {
    args.dk.f32()[i] = static_cast<float>(dk[i]);
    args.dv.f32()[i] = static_cast<float>(dv[i]);
  }
}

}  // namespace deltafox::reference
