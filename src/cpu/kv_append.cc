// Bound by memory: plain loops. One task is one head of one sequence, so that running sums and
// maxima follow the tokens.
#include "ops/kv_append.h"

#include <cmath>

namespace deltafox::cpu {
namespace {

void append_rows(const KvAppendArgs& args, std::int64_t b, std::int64_t g) {
  KvCache& cache = *args.caches[static_cast<std::size_t>(b)];
  const KvLayout& layout = cache.layout();
  const std::int64_t dim = layout.head_dim;
  const std::int64_t stride = layout.value_stride();
  const std::int64_t first = cache.length() - args.sequences.length(b);
  float norm = 0;
  if (layout.key_norms && first > 0) {
    norm = cache.page((first - 1) / kKvPage).key_norms.f32()[g * kKvPage + (first - 1) % kKvPage];
  }
  for (std::int64_t position = first; position < cache.length(); ++position) {
    const std::int64_t row = args.sequences.begin(b) + position - first;
    const float* k = args.k.f32() + (row * layout.kv_heads + g) * dim;
    const float* v = args.v.f32() + (row * layout.kv_heads + g) * dim;
    KvPage& page = cache.page(position / kKvPage);
    const std::int64_t at = position % kKvPage;
    float* keys = page.keys.f32() + g * dim * kKvPage + at;
    for (std::int64_t i = 0; i < dim; ++i) keys[i * kKvPage] = k[i];
    std::copy_n(v, dim, page.values.f32() + (g * kKvPage + at) * stride);
    if (!layout.key_norms) continue;
    double squares = 0;
    for (std::int64_t i = 0; i < dim; ++i) squares += static_cast<double>(k[i]) * k[i];
    norm = std::max(norm, static_cast<float>(std::sqrt(squares)));
    page.key_norms.f32()[g * kKvPage + at] = norm;
  }
}

void append_gates(const KvAppendArgs& args, std::int64_t b, std::int64_t h) {
  KvCache& cache = *args.caches[static_cast<std::size_t>(b)];
  const std::int64_t heads = cache.layout().gate_heads;
  const std::int64_t first = cache.length() - args.sequences.length(b);
  const auto high = [&](std::int64_t position) -> float& {
    return cache.page(position / kKvPage).gates.f32()[h * kKvPage + position % kKvPage];
  };
  const auto low = [&](std::int64_t position) -> float& {
    return (&high(position))[heads * kKvPage];
  };
  double sum = first > 0 ? static_cast<double>(high(first - 1)) + low(first - 1) : 0;
  for (std::int64_t position = first; position < cache.length(); ++position) {
    sum += args.log_gates.f32()[(args.sequences.begin(b) + position - first) * heads + h];
    high(position) = static_cast<float>(sum);
    low(position) = static_cast<float>(sum - high(position));
    // What is kept, not what is more exact: a sum continued from the cache gets the same bits.
    sum = static_cast<double>(high(position)) + low(position);
  }
}

}  // namespace

void kv_append(Context& ctx, const KvAppendArgs& args) {
  const KvLayout& layout = args.caches[0]->layout();
  const std::int64_t tasks = layout.kv_heads + layout.gate_heads;
  ctx.threads().parallel_for(args.sequences.count() * tasks, [&](std::int64_t task) {
    const std::int64_t b = task / tasks;
    const std::int64_t head = task % tasks;
    if (head < layout.kv_heads) {
      append_rows(args, b, head);
    } else {
      append_gates(args, b, head - layout.kv_heads);
    }
  });
}

}  // namespace deltafox::cpu
