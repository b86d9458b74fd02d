// See ops/forgetting_attention.h for the equations. One task is up to kRows successive queries of
// one head of one sequence. It visits the pages that one of them sees, oldest first; each query
// masks what it does not see or skips, so that rows do not depend on one another.
#include "ops/forgetting_attention.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forgetting_attention.cc"
#include <hwy/foreach_target.h>

#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/small_gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kRows = 32;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Queries [row, row + count) of the batch, at positions position... of sequence b.
struct Block {
  std::int64_t sequence;
  std::int64_t row;
  std::int64_t position;
  std::int64_t count;
};

// Memory of a task.
struct Work {
  float* q;             // [kRows, D], scaled by 1 / √D
  float* scores;        // [kRows, kKvPage], then the weights
  float* o;             // [kRows, value_stride]
  float* max;           // [kRows] the running maximum of a row's scores
  double* sum;          // [kRows] the running sum of its weights
  std::int64_t* begin;  // [kRows] the first position that it reads

  static std::int64_t floats(const KvLayout& layout) {
    return kRows * (layout.head_dim + kKvPage + layout.value_stride() + 1 + 2 + 2);
  }
  Work(float* memory, const KvLayout& layout) {
    const auto take = [&](std::int64_t n) { return std::exchange(memory, memory + kRows * n); };
    sum = reinterpret_cast<double*>(take(2));
    begin = reinterpret_cast<std::int64_t*>(take(2));
    scores = take(kKvPage);
    o = take(layout.value_stride());
    q = take(layout.head_dim);
    max = take(1);
  }
};

// One head's log gates of a page: sums up to each token, in two parts.
struct Gates {
  const float* high;  // [kKvPage], null without gates
  const float* low;

  Gates(const KvCache& cache, std::int64_t page, std::int64_t head) : high(nullptr), low(nullptr) {
    const std::int64_t heads = cache.layout().gate_heads;
    if (heads == 0) return;
    high = cache.page(page).gates.f32() + head * kKvPage;
    low = high + heads * kKvPage;
  }
  // Σ log f from behind token `key` of these up to token `query` of `of_query`
  float between(const Gates& of_query, std::int64_t query, std::int64_t key) const {
    return (of_query.high[query] - high[key]) + (of_query.low[query] - low[key]);
  }
};

// The first page that the query at `position` reads: those before decay below the threshold.
HWY_INLINE std::int64_t first_kept_page(const KvCache& cache, std::int64_t head,
                                        std::int64_t position, float threshold) {
  const Gates query(cache, position / kKvPage, head);
  std::int64_t low = cache.first_visible(position) / kKvPage;
  std::int64_t high = position / kKvPage;  // the query's own page is kept
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    // The last key of a page is its least decayed one.
    const float decay = Gates(cache, middle, head).between(query, position % kKvPage, kKvPage - 1);
    if (decay < threshold) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Fills work.q and work.begin, and the rest with what a pass begins with.
HWY_INLINE void begin_rows(const ForgettingAttentionArgs& args, const Block& block,
                           std::int64_t head, const Work& work) {
  const KvCache& cache = *args.caches[static_cast<std::size_t>(block.sequence)];
  const KvLayout& layout = cache.layout();
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t dim = layout.head_dim;
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  for (std::int64_t r = 0; r < block.count; ++r) {
    const float* from = args.q.f32() + ((block.row + r) * heads + head) * dim;
    float* q = work.q + r * dim;
    for (std::int64_t i = 0; i < dim; ++i) q[i] = from[i] * scale;
    work.max[r] = kMinusInfinity;
    work.sum[r] = 0;
    const std::int64_t position = block.position + r;
    work.begin[r] = cache.first_visible(position);
    if (!args.log_pruning_tolerance || layout.gate_heads == 0) continue;
    float bound = 0;
    if (args.score_bounds.empty()) {
      const std::int64_t g = head / (heads / layout.kv_heads);
      const float* norms = cache.page(position / kKvPage).key_norms.f32() + g * kKvPage;
      bound = std::sqrt(sum_of_squares(q, dim)) * norms[position % kKvPage];
    } else {
      bound = args.score_bounds[static_cast<std::size_t>(head)];
    }
    const float threshold =
        *args.log_pruning_tolerance - 2 * bound - std::log(static_cast<float>(position + 1));
    const std::int64_t page = first_kept_page(cache, head, position, threshold);
    work.begin[r] = std::max(work.begin[r], page * kKvPage);
  }
  std::fill(work.o, work.o + block.count * layout.value_stride(), 0.0f);
}

// scores[0, kKvPage) become weights relative to the row's maximum so far; those outside
// [begin, end) become 0.
HWY_INLINE void softmax_row(float* scores, std::int64_t begin, std::int64_t end, const Gates& keys,
                            const Gates& queries, std::int64_t query, const Work& work,
                            std::int64_t row, std::int64_t stride) {
  if (begin >= end) {
    std::fill(scores, scores + kKvPage, 0.0f);
    return;
  }
  std::fill(scores, scores + begin, kMinusInfinity);
  std::fill(scores + end, scores + kKvPage, kMinusInfinity);
  VF32 maxima = hn::Set(kF32, work.max[row]);
  const float high = queries.high != nullptr ? queries.high[query] : 0;
  const float low = queries.high != nullptr ? queries.low[query] : 0;
  for (std::int64_t j = 0; j < kKvPage; j += lanes()) {
    VF32 s = load(scores + j);
    if (keys.high != nullptr) {
      const VF32 decay = hn::Add(hn::Sub(hn::Set(kF32, high), load(keys.high + j)),
                                 hn::Sub(hn::Set(kF32, low), load(keys.low + j)));
      s = hn::Add(s, decay);
      store(s, scores + j);
    }
    maxima = hn::Max(maxima, s);
  }
  const float max = hn::GetLane(hn::MaxOfLanes(kF32, maxima));
  if (max > work.max[row]) {
    const float factor = std::exp(work.max[row] - max);
    float* o = work.o + row * stride;
    for (std::int64_t i = 0; i < stride; ++i) o[i] *= factor;
    work.sum[row] *= factor;
    work.max[row] = max;
  }
  VF32 sums = hn::Zero(kF32);
  for (std::int64_t j = 0; j < kKvPage; j += lanes()) {
    const VF32 weight = hn::Exp(kF32, hn::Sub(load(scores + j), hn::Set(kF32, max)));
    store(weight, scores + j);
    sums = hn::Add(sums, weight);
  }
  work.sum[row] += sum_of(sums);
}

HWY_INLINE void visit_page(const ForgettingAttentionArgs& args, const Block& block,
                           std::int64_t head, std::int64_t p, const Work& work) {
  const KvCache& cache = *args.caches[static_cast<std::size_t>(block.sequence)];
  const KvLayout& layout = cache.layout();
  const std::int64_t dim = layout.head_dim;
  const std::int64_t stride = layout.value_stride();
  const std::int64_t g = head / (args.q.shape[1] / layout.kv_heads);
  const KvPage& page = cache.page(p);
  const float* keys = page.keys.f32() + g * dim * kKvPage;
  const float* values = page.values.f32() + g * kKvPage * stride;
  const std::int64_t first = p * kKvPage;
  // Keys that the last row sees.
  const std::int64_t seen = std::min(kKvPage, block.position + block.count - first);

  std::fill(work.scores, work.scores + block.count * kKvPage, 0.0f);
  small_gemm(block.count, (seen + 15) / 16 * 16, dim, {work.q, dim, 1}, keys, kKvPage, work.scores,
             kKvPage);
  const Gates key_gates(cache, p, head);
  for (std::int64_t r = 0; r < block.count; ++r) {
    const std::int64_t position = block.position + r;
    softmax_row(work.scores + r * kKvPage, std::max<std::int64_t>(0, work.begin[r] - first),
                std::min(kKvPage, position + 1 - first), key_gates,
                Gates(cache, position / kKvPage, head), position % kKvPage, work, r, stride);
  }
  small_gemm(block.count, stride, seen, {work.scores, kKvPage, 1}, values, stride, work.o, stride);
}

struct PageCounts {
  std::int64_t seen;
  std::int64_t skipped;
};

HWY_INLINE PageCounts attend(const ForgettingAttentionArgs& args, const Block& block,
                             std::int64_t head, const Work& work) {
  const KvCache& cache = *args.caches[static_cast<std::size_t>(block.sequence)];
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t dim = args.q.shape[2];
  const std::int64_t stride = cache.layout().value_stride();
  begin_rows(args, block, head, work);
  const std::int64_t first_seen = cache.first_visible(block.position) / kKvPage;
  const std::int64_t first = *std::min_element(work.begin, work.begin + block.count) / kKvPage;
  const std::int64_t last = (block.position + block.count - 1) / kKvPage;
  for (std::int64_t p = first; p <= last; ++p) visit_page(args, block, head, p, work);
  for (std::int64_t r = 0; r < block.count; ++r) {
    const auto scale = static_cast<float>(1 / work.sum[r]);
    float* to = args.o.f32() + ((block.row + r) * heads + head) * dim;
    for (std::int64_t i = 0; i < dim; ++i) to[i] = work.o[r * stride + i] * scale;
    if (args.lse.data != nullptr) {
      args.lse.f32()[(block.row + r) * heads + head] =
          static_cast<float>(work.max[r] + std::log(work.sum[r]));
    }
  }
  return {last - first_seen + 1, first - first_seen};
}

std::span<Block> blocks_of(const ForgettingAttentionArgs& args, ScratchScope& scratch) {
  std::int64_t count = 0;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    count += (args.sequences.length(b) + kRows - 1) / kRows;
  }
  const std::span<Block> blocks = scratch.array<Block>(count);
  std::size_t at = 0;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const std::int64_t length = args.sequences.length(b);
    const std::int64_t before = args.caches[static_cast<std::size_t>(b)]->length() - length;
    for (std::int64_t t = 0; t < length; t += kRows) {
      blocks[at++] = {b, args.sequences.begin(b) + t, before + t, std::min(kRows, length - t)};
    }
  }
  return blocks;
}

}  // namespace

void forgetting_attention_target(Context& ctx, const ForgettingAttentionArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const KvLayout& layout = args.caches[0]->layout();
  ScratchScope scratch(ctx);
  const std::span<const Block> blocks = blocks_of(args, scratch);
  const auto count = static_cast<std::int64_t>(blocks.size());
  // Rounded up to a cache line.
  const std::int64_t slot_floats = (Work::floats(layout) + 15) / 16 * 16;
  float* slots = scratch.tensor({ctx.threads().size(), slot_floats}).f32();
  std::atomic<std::int64_t> seen{0};
  std::atomic<std::int64_t> skipped{0};
  ctx.threads().parallel_for(count * heads, [&](std::int64_t task, int slot) {
    // Blocks of a head follow one another, so that its keys and values stay in the caches. The last
    // ones of a sequence have the most keys: they go first.
    const Block& block = blocks[static_cast<std::size_t>(count - 1 - task % count)];
    const Work work(slots + slot * slot_floats, layout);
    const PageCounts pages = attend(args, block, task / count, work);
    seen.fetch_add(pages.seen, std::memory_order_relaxed);
    skipped.fetch_add(pages.skipped, std::memory_order_relaxed);
  });
  ctx.statistics().attention_blocks += seen;
  ctx.statistics().attention_blocks_skipped += skipped;
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(forgetting_attention_target);
void forgetting_attention(Context& ctx, const ForgettingAttentionArgs& args) {
  HWY_DYNAMIC_DISPATCH(forgetting_attention_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
