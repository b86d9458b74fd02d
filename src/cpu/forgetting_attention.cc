// See ops/forgetting_attention.h for the equations. One task is a block of successive queries of
// one head of one sequence. It visits the pages that one of them sees, oldest first; each query
// masks what it does not see or skips, so that rows do not depend on one another.
//
// Products are float32, or by tiles of rows rounded to bfloat16: then a page is rounded and packed
// once for all queries of the block, which a few queries would not pay for. With AMX a stretch is,
// and queries visit blocks of 256 keys.
//
// Weights are summed by stretches of 16 pages, and stretches are added one after the other. Where
// there are fewer blocks and heads than threads, stretches are tasks too: the same sums.
#include "ops/forgetting_attention.h"

#include "cpu/attention_amx.h"
#include "cpu/bf16_tiles.h"
#include "cpu/isa.h"
#include "cpu/streamed.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forgetting_attention.cc"
#include <hwy/foreach_target.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <numbers>

#include <hwy/cache_control.h>

#include "cpu/small_gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kRows = 32;  // that are worked on at a time
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

constexpr float kLowest = -std::numeric_limits<float>::max();
constexpr std::int64_t kStretchPages = 16;
// What is left of a call behind the last multiple of kTilePeriod of its tokens has tiles from so
// many on. Pieces of a call end at such multiples: where they end changes nothing.
constexpr std::int64_t kTilePeriod = 64;
constexpr std::int64_t kLeastTileRows = 12;

// How a block is worked on.
enum class Kind {
  kF32,
  kBf16,  // by small products of rows rounded to bfloat16
  kAmx,   // by cpu/attention_amx.h
};

// Queries [row, row + count) of the batch, at positions position... of sequence b.
struct Block {
  std::int64_t sequence;
  std::int64_t row;
  std::int64_t position;
  std::int64_t count;
  Kind kind;

  std::int64_t last_page() const { return (position + count - 1) / kKvPage; }
};

// Of some keys, relative to the greatest score of each row.
struct Sums {
  float* o = nullptr;     // [rows, value_stride] weighted values; for kAmx of kRows rows as there
  float* max = nullptr;   // [rows] the greatest score, kLowest before the first; for kAmx as there
  double* sum = nullptr;  // [rows] of weights
  std::int64_t stride = 0;
  bool amx = false;

  // rows is a multiple of kRows.
  static std::int64_t floats(std::int64_t rows, std::int64_t stride) {
    return rows * (stride + 1 + 2);
  }
  Sums() = default;
  Sums(float* memory, std::int64_t rows, std::int64_t value_stride, bool of_amx)
      : o(memory + 3 * rows),
        max(memory + 2 * rows),
        sum(reinterpret_cast<double*>(memory)),
        stride(value_stride),
        amx(of_amx) {}

  // Sixteen columns of a row, from a multiple of 16 on.
  float* at(std::int64_t row, std::int64_t column) const {
    if (!amx) return o + row * stride + column;
    return o + row / kTileSide * kTileSide * stride + column * kTileSide +
           row % kTileSide * kTileSide;
  }
  // From a multiple of kRows on.
  Sums from(std::int64_t row) const {
    Sums result = *this;
    result.o += row * stride;
    result.max += row;
    result.sum += row;
    return result;
  }
};

// Memory of a task: of kRows rows, or with _of_block of all rows of the block. kKvPage is written
// P, the keys of a stretch S, D' is D rounded up to 32 and V value_stride.
struct Work {
  std::int64_t* begin = nullptr;  // of_block [rows] the first position that it reads
  Sums total;                     // of_block, of the stretches before the one under way
  Sums stretch;                   // of that one; of_block, but kRows for kAmx
  float* scores = nullptr;        // [kRows, P], then the weights; for kAmx as there
  float* q = nullptr;             // of_block [rows, D], scaled by 1 / √D; not for kAmx
  // But for kF32:
  std::uint16_t* q_bf16 = nullptr;   // of_block [rows, D']; for kAmx as there
  std::uint16_t* keys = nullptr;     // [D', P] packed; for kAmx [S / P, D', P]
  std::uint16_t* values = nullptr;   // [P, V] packed; for kAmx [S / 32, 32, V]
  std::uint16_t* weights = nullptr;  // [kRows, P] for kBf16
  // With gates for kAmx, in two parts:
  float* key_high = nullptr;  // [S]
  float* key_low = nullptr;
  float* query_high = nullptr;  // of_block [rows]
  float* query_low = nullptr;

  static std::int64_t floats(const KvLayout& layout, std::int64_t rows, Kind kind) {
    std::int64_t end = 0;
    const Work all(nullptr, layout, rows, kind, &end);
    return end;
  }
  Work(float* memory, const KvLayout& layout, std::int64_t rows, Kind kind,
       std::int64_t* end = nullptr) {
    const std::int64_t dim = layout.head_dim;
    const std::int64_t stride = layout.value_stride();
    const bool amx = kind == Kind::kAmx;
    const std::int64_t at_a_time = amx ? kStretchPages * kKvPage : kKvPage;
    std::int64_t used = 0;
    // n floats, from a cache line on.
    const auto take = [&](std::int64_t n) {
      const std::int64_t at = std::exchange(used, used + (n + 15) / 16 * 16);
      return memory != nullptr ? memory + at : nullptr;
    };
    const auto take_bf16 = [&](std::int64_t n) {
      return reinterpret_cast<std::uint16_t*>(take(n / 2));
    };
    begin = reinterpret_cast<std::int64_t*>(take(2 * rows));
    const auto take_sums = [&](std::int64_t count) {
      float* const at = take(Sums::floats(count, stride));
      return at != nullptr ? Sums(at, count, stride, amx) : Sums{};
    };
    total = take_sums(rows);
    stretch = take_sums(amx ? kRows : rows);
    scores = take(kRows * (amx ? bf16::kAttentionBlock : kKvPage));
    if (!amx) q = take(rows * dim);
    if (kind != Kind::kF32) {
      q_bf16 = take_bf16(rows * padded_depth(dim));
      keys = take_bf16(padded_depth(dim) * at_a_time);
      values = take_bf16(at_a_time * stride);
    }
    if (kind == Kind::kBf16) weights = take_bf16(kRows * kKvPage);
    if (amx && layout.gate_heads > 0) {
      key_high = take(at_a_time);
      key_low = take(at_a_time);
      query_high = take(rows);
      query_low = take(rows);
    }
    if (end != nullptr) *end = used;
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

constexpr std::int64_t round_up_to_lanes(std::int64_t n) {
  return (n + 15) / 16 * 16;
}

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

// Rows of queries and outputs lie far apart: the processor does not see them coming.
constexpr std::int64_t kFetchedAhead = 8;
template <bool kToWrite>
HWY_INLINE void fetch(const float* row, std::int64_t dim) {
  for (std::int64_t i = 0; i < dim; i += 16) __builtin_prefetch(row + i, kToWrite ? 1 : 0);
}

// Fills what Work has of the block's queries.
HWY_INLINE void begin_rows(const ForgettingAttentionArgs& args, const Block& block,
                           std::int64_t head, const Work& work) {
  const KvCache& cache = *args.caches[static_cast<std::size_t>(block.sequence)];
  const KvLayout& layout = cache.layout();
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t dim = layout.head_dim;
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  const float* const q = args.q.f32() + (block.row * heads + head) * dim;
  if (block.kind != Kind::kAmx) {
    for (std::int64_t r = 0; r < block.count; ++r) {
      const float* from = q + r * heads * dim;
      for (std::int64_t i = 0; i < dim; ++i) work.q[r * dim + i] = from[i] * scale;
    }
  }
  for (std::int64_t r = 0; r < block.count; ++r) {
    const std::int64_t position = block.position + r;
    work.begin[r] = cache.first_visible(position);
    if (!args.log_pruning_tolerance || layout.gate_heads == 0) continue;
    float bound = 0;
    if (args.score_bounds.empty()) {
      const std::int64_t g = head / (heads / layout.kv_heads);
      const float* norms = cache.page(position / kKvPage).key_norms.f32() + g * kKvPage;
      const float norm = block.kind == Kind::kAmx
                             ? scale * std::sqrt(sum_of_squares(q + r * heads * dim, dim))
                             : std::sqrt(sum_of_squares(work.q + r * dim, dim));
      bound = norm * norms[position % kKvPage];
    } else {
      bound = args.score_bounds[static_cast<std::size_t>(head)];
    }
    // Rounding both q and k to bfloat16 adds 2^-8 to a product at most.
    if (block.kind != Kind::kF32) bound *= 1 + 1.0F / 128;
    const float threshold =
        *args.log_pruning_tolerance - 2 * bound - std::log(static_cast<float>(position + 1));
    const std::int64_t page = first_kept_page(cache, head, position, threshold);
    work.begin[r] = std::max(work.begin[r], page * kKvPage);
  }
#if defined(__x86_64__)
  if (block.kind == Kind::kBf16) {
    bf16::round_left(work.q, dim, block.count, dim, 1, work.q_bf16, padded_depth(dim));
  } else if (block.kind == Kind::kAmx) {
    const std::int64_t depth = padded_depth(dim);
    // Of rows that are not there as well.
    std::fill(work.q_bf16 + block.count / kRows * kRows * depth,
              work.q_bf16 + (block.count + kRows - 1) / kRows * kRows * depth, 0);
    for (std::int64_t r = 0; r < block.count; ++r) {
      const float* from = q + r * heads * dim;
      if (r + kFetchedAhead < block.count) fetch<false>(from + kFetchedAhead * heads * dim, dim);
      std::uint16_t* to =
          work.q_bf16 + r / kTileSide * kTileSide * depth + r % kTileSide * kTileDepth;
      for (std::int64_t i = 0; i < depth; i += kTileDepth, to += kTileSide * kTileDepth) {
        bf16::round_left(from + i, 0, 1, std::min(kTileDepth, dim - i), scale, to, kTileDepth);
      }
    }
    if (layout.gate_heads == 0) return;
    for (std::int64_t r = 0; r < block.count; ++r) {
      const std::int64_t position = block.position + r;
      const Gates gates(cache, position / kKvPage, head);
      work.query_high[r] = gates.high[position % kKvPage];
      work.query_low[r] = gates.low[position % kKvPage];
    }
  }
#endif
}

// Masks a row of scores outside [begin, end), adds what the gates between query and keys say, and
// returns the greatest, or kMinusInfinity.
HWY_INLINE float finish_scores(float* scores, std::int64_t begin, std::int64_t end,
                               const Gates& keys, const Gates& queries, std::int64_t query) {
  std::fill(scores, scores + std::min(begin, kKvPage), kMinusInfinity);
  std::fill(scores + std::max<std::int64_t>(end, 0), scores + kKvPage, kMinusInfinity);
  VF32 maxima = hn::Set(kF32, kMinusInfinity);
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
  return hn::GetLane(hn::MaxOfLanes(kF32, maxima));
}

// Scores of rows [row, row + rows) of the block, of the page from position `first` on, become
// weights relative to each row's maximum so far; what a row does not read becomes 0.
HWY_INLINE void softmax_rows(const KvCache& cache, const Block& block, std::int64_t head,
                             std::int64_t first, std::int64_t row, std::int64_t rows,
                             const Work& work) {
  const Gates keys(cache, first / kKvPage, head);
  const std::int64_t stride = cache.layout().value_stride();
  const Sums& sums = work.stretch;
  HWY_ALIGN float maxima[kRows];
  HWY_ALIGN float factors[kRows];  // from the maxima before to these
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t position = block.position + row + r;
    const float max = finish_scores(work.scores + r * kKvPage,
                                    std::max<std::int64_t>(0, work.begin[row + r] - first),
                                    std::min(kKvPage, position + 1 - first), keys,
                                    Gates(cache, position / kKvPage, head), position % kKvPage);
    maxima[r] = std::max(max, sums.max[row + r]);
  }
  std::fill(maxima + rows, maxima + kRows, 0.0f);
  for (std::int64_t r = 0; r < rows; r += lanes()) {
    const VF32 max = load(maxima + r);
    store(hn::Exp(kF32, hn::Sub(load(sums.max + row + r), max)), factors + r);
    store(max, sums.max + row + r);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    float* scores = work.scores + r * kKvPage;
    const VF32 max = hn::Set(kF32, maxima[r]);
    VF32 sum = hn::Zero(kF32);
    for (std::int64_t j = 0; j < kKvPage; j += lanes()) {
      const VF32 weight = hn::Exp(kF32, hn::Sub(load(scores + j), max));
      store(weight, scores + j);
      sum = hn::Add(sum, weight);
    }
    sums.sum[row + r] = sums.sum[row + r] * factors[r] + sum_of(sum);
    if (factors[r] == 1) continue;
    float* o = sums.o + (row + r) * stride;
    const VF32 factor = hn::Set(kF32, factors[r]);
    for (std::int64_t i = 0; i < stride; i += lanes()) store(hn::Mul(load(o + i), factor), o + i);
  }
}

// The first position that one of these rows reads.
HWY_INLINE std::int64_t first_read(const Work& work, std::int64_t row, std::int64_t rows) {
  return *std::min_element(work.begin + row, work.begin + row + rows);
}

// A page's keys and values of one head.
struct Page {
  const float* keys;    // [D, kKvPage]
  const float* values;  // [kKvPage, value_stride]
  std::int64_t seen;    // of the keys, by a row of the block
  bool packed;          // as operands of tiles, in the task's memory
};

// scores = q kᵀ for rows [row, row + rows) of the block
HWY_INLINE void page_scores(const Page& page, const KvLayout& layout, std::int64_t row,
                            std::int64_t rows, const Work& work) {
#if defined(__x86_64__)
  if (page.packed) {
    const std::int64_t dim = padded_depth(layout.head_dim);
    bf16::multiply({.left = work.q_bf16 + row * dim,
                    .left_stride = dim,
                    .right = work.keys,
                    .right_depth = dim,
                    .rows = rows,
                    .columns = round_up_to_lanes(page.seen),
                    .depth = dim,
                    .y = work.scores,
                    .y_stride = kKvPage,
                    .accumulate = false});
    return;
  }
#endif
  const std::int64_t dim = layout.head_dim;
  std::fill(work.scores, work.scores + rows * kKvPage, 0.0f);
  small_gemm(rows, round_up_to_lanes(page.seen), dim, {work.q + row * dim, dim, 1}, page.keys,
             kKvPage, work.scores, kKvPage);
}

// o += weights v for these rows
HWY_INLINE void page_output(const Page& page, const KvLayout& layout, std::int64_t row,
                            std::int64_t rows, const Work& work) {
  const std::int64_t stride = layout.value_stride();
  float* o = work.stretch.o + row * stride;
#if defined(__x86_64__)
  if (page.packed) {
    bf16::round_left(work.scores, kKvPage, rows, kKvPage, 1, work.weights, kKvPage);
    bf16::multiply({.left = work.weights,
                    .left_stride = kKvPage,
                    .right = work.values,
                    .right_depth = kKvPage,
                    .rows = rows,
                    .columns = stride,
                    .depth = kKvPage,
                    .y = o,
                    .y_stride = stride,
                    .accumulate = true});
    return;
  }
#endif
  small_gemm(rows, stride, page.seen, {work.scores, kKvPage, 1}, page.values, stride, o, stride);
}

HWY_INLINE void visit_page(const ForgettingAttentionArgs& args, const Block& block,
                           std::int64_t head, std::int64_t p, const Work& work) {
  const KvCache& cache = *args.caches[static_cast<std::size_t>(block.sequence)];
  const KvLayout& layout = cache.layout();
  const std::int64_t stride = layout.value_stride();
  const std::int64_t g = head / (args.q.shape[1] / layout.kv_heads);
  const std::int64_t first = p * kKvPage;
  const Page page{.keys = cache.page(p).keys.f32() + g * layout.head_dim * kKvPage,
                  .values = cache.page(p).values.f32() + g * kKvPage * stride,
                  .seen = std::min(kKvPage, block.position + block.count - first),
                  .packed = block.kind == Kind::kBf16};
#if defined(__x86_64__)
  if (page.packed) {
    const std::int64_t dim = layout.head_dim;
    bf16::pack_right(page.keys, kKvPage, dim, padded_depth(dim), kKvPage, work.keys,
                     padded_depth(dim));
    bf16::pack_right(page.values, stride, page.seen, kKvPage, stride, work.values, kKvPage);
  }
#endif
  // Rows before the page see nothing of it.
  const std::int64_t before = std::max<std::int64_t>(0, first - block.position);
  for (std::int64_t row = before / kRows * kRows; row < block.count; row += kRows) {
    const std::int64_t rows = std::min(kRows, block.count - row);
    if (first_read(work, row, rows) >= first + kKvPage) continue;
    page_scores(page, layout, row, rows, work);
    softmax_rows(cache, block, head, first, row, rows, work);
    page_output(page, layout, row, rows, work);
  }
}

// For every kRows queries.
struct PageCounts {
  std::int64_t seen;
  std::int64_t skipped;
};

PageCounts count_pages(const KvCache& cache, const Block& block, const Work& work) {
  PageCounts pages{};
  for (std::int64_t row = 0; row < block.count; row += kRows) {
    const std::int64_t rows = std::min(kRows, block.count - row);
    const std::int64_t first_seen = cache.first_visible(block.position + row) / kKvPage;
    pages.seen += (block.position + row + rows - 1) / kKvPage + 1 - first_seen;
    pages.skipped += first_read(work, row, rows) / kKvPage - first_seen;
  }
  return pages;
}

// Of no keys; for all rows that vectors touch.
HWY_INLINE void clear(const Sums& sums, std::int64_t count) {
  const std::int64_t rows = (count + kRows - 1) / kRows * kRows;
  std::fill(sums.o, sums.o + (sums.amx ? rows : count) * sums.stride, 0.0f);
  std::fill(sums.max, sums.max + rows, kLowest);
  std::fill(sums.sum, sums.sum + count, 0.0);
}

// total += stretch
HWY_INLINE void add_stretch(const Sums& stretch, std::int64_t count, const Sums& total) {
  for (std::int64_t r = 0; r < count; ++r) {
    const float max = std::max(stretch.max[r], total.max[r]);
    const auto relative = [&](float before) {
      return total.amx ? std::exp2(before - max) : std::exp(before - max);
    };
    const float of_stretch = relative(stretch.max[r]);
    const float of_total = relative(total.max[r]);
    total.max[r] = max;
    total.sum[r] = total.sum[r] * of_total + stretch.sum[r] * of_stretch;
    const VF32 first = hn::Set(kF32, of_total);
    const VF32 second = hn::Set(kF32, of_stretch);
    for (std::int64_t c = 0; c < total.stride; c += kTileSide) {
      const float* from = stretch.at(r, c);
      float* to = total.at(r, c);
      for (std::int64_t i = 0; i < kTileSide; i += lanes()) {
        const VF32 added = hn::Mul(load(from + i), second);
        store(hn::MulAdd(load(to + i), first, added), to + i);
      }
    }
  }
}

// Writes `count` rows of a block from `row` on, of which `total` are the sums.
void finish(const ForgettingAttentionArgs& args, const Block& block, std::int64_t head,
            std::int64_t row, std::int64_t count, const Sums& total) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t dim = args.q.shape[2];
  const bool streams = total.amx && dim % kTileSide == 0 &&
                       reinterpret_cast<std::uintptr_t>(args.o.data) % 64 == 0 &&
                       args.o.shape.size() * 4 > kStreamedBytes;
  for (std::int64_t r = 0; r < count; ++r) {
    const auto scale = static_cast<float>(1 / total.sum[r]);
    float* to = args.o.f32() + ((block.row + row + r) * heads + head) * dim;
    if (!streams && row + r + kFetchedAhead < block.count)
      fetch<true>(to + kFetchedAhead * heads * dim, dim);
    for (std::int64_t c = 0; c < dim; c += kTileSide) {
      const float* from = total.at(r, c);
      if (streams) {
        for (std::int64_t i = 0; i < kTileSide; i += lanes()) {
          hn::Stream(hn::Mul(load(from + i), hn::Set(kF32, scale)), kF32, to + c + i);
        }
        continue;
      }
      for (std::int64_t i = c; i < std::min(dim, c + kTileSide); ++i) to[i] = from[i - c] * scale;
    }
    if (args.lse.data != nullptr) {
      const double max = total.amx ? total.max[r] * std::numbers::ln2 : total.max[r];
      args.lse.f32()[(block.row + r) * heads + head] =
          static_cast<float>(max + std::log(total.sum[r]));
    }
  }
  if (streams) hwy::FlushStream();
}

#if defined(__x86_64__)
// Pages [first, end) of a stretch, which begins with page `begin`, as operands.
HWY_INLINE void pack_stretch(const ForgettingAttentionArgs& args, const Block& block,
                             std::int64_t head, std::int64_t begin, std::int64_t first,
                             std::int64_t end, const Work& work) {
  constexpr std::int64_t kStep = kTileDepth;
  const KvCache& cache = *args.caches[static_cast<std::size_t>(block.sequence)];
  const KvLayout& layout = cache.layout();
  const std::int64_t dim = layout.head_dim;
  const std::int64_t stride = layout.value_stride();
  const std::int64_t g = head / (args.q.shape[1] / layout.kv_heads);
  for (std::int64_t p = first; p < end; ++p) {
    const float* keys = cache.page(p).keys.f32() + g * dim * kKvPage;
    const float* values = cache.page(p).values.f32() + g * kKvPage * stride;
    const std::int64_t at = (p - begin) * kKvPage;
    const std::int64_t seen = block.position + block.count - p * kKvPage;
    bf16::pack_right(keys, kKvPage, dim, padded_depth(dim), kKvPage,
                     work.keys + at * padded_depth(dim), padded_depth(dim));
    for (std::int64_t k = 0; k < kKvPage; k += kStep) {
      bf16::pack_right(values + k * stride, stride, std::clamp<std::int64_t>(seen - k, 0, kStep),
                       kStep, stride, work.values + (at + k) * stride, kStep);
    }
    if (layout.gate_heads == 0) continue;
    const Gates gates(cache, p, head);
    std::copy_n(gates.high, kKvPage, work.key_high + at);
    std::copy_n(gates.low, kKvPage, work.key_low + at);
  }
}

// What becomes of the sums of a stretch.
enum class Then {
  kKeep,    // in work.stretch, which has all rows of the block
  kAdd,     // to work.total
  kFinish,  // there are no others
};

// A stretch by AMX.
HWY_INLINE void attend_stretch_amx(const ForgettingAttentionArgs& args, const Block& block,
                                   std::int64_t head, std::int64_t stretch, Then then,
                                   const Work& work) {
  constexpr std::int64_t kStep = kTileDepth;
  constexpr std::int64_t kKeys = kStretchPages * kKvPage;
  const KvLayout& layout = args.caches[static_cast<std::size_t>(block.sequence)]->layout();
  const std::int64_t depth = padded_depth(layout.head_dim);
  const std::int64_t begin = stretch * kStretchPages;
  const std::int64_t first = std::max(first_read(work, 0, block.count) / kKvPage, begin);
  const std::int64_t end = std::min(block.last_page() + 1, begin + kStretchPages);
  pack_stretch(args, block, head, begin, first, end, work);
  const bool gated = layout.gate_heads > 0;
  for (std::int64_t row = 0; row < block.count; row += kRows) {
    const std::int64_t rows = std::min(kRows, block.count - row);
    std::int64_t begins[kRows];
    std::int64_t ends[kRows];
    for (std::int64_t r = 0; r < rows; ++r) {
      begins[r] = std::max<std::int64_t>(0, work.begin[row + r] - begin * kKvPage);
      ends[r] = std::min(kKeys, block.position + row + r + 1 - begin * kKvPage);
    }
    const Sums sums = then == Then::kKeep ? work.stretch.from(row) : work.stretch;
    const std::int64_t first_key = *std::min_element(begins, begins + rows) / kStep * kStep;
    const std::int64_t end_key = (ends[rows - 1] + kStep - 1) / kStep * kStep;
    if (first_key >= end_key) {
      if (then == Then::kKeep) clear(sums, rows);
      continue;
    }
    bf16::attend_amx({.q = work.q_bf16 + row * depth,
                      .rows = rows,
                      .depth = depth,
                      .columns = layout.value_stride(),
                      .keys = work.keys,
                      .values = work.values,
                      .first = first_key,
                      .end = end_key,
                      .begins = begins,
                      .ends = ends,
                      .key_gates = {work.key_high, work.key_low},
                      .query_gates = {gated ? work.query_high + row : nullptr,
                                      gated ? work.query_low + row : nullptr},
                      .scores = work.scores},
                     {.o = sums.o, .max = sums.max, .sum = sums.sum});
    if (then == Then::kAdd) add_stretch(sums, rows, work.total.from(row));
    if (then == Then::kFinish) finish(args, block, head, row, rows, sums);
  }
}
#endif

// work.stretch of a block, for which begin_rows was called.
HWY_INLINE void attend_stretch(const ForgettingAttentionArgs& args, const Block& block,
                               std::int64_t head, std::int64_t stretch, const Work& work) {
#if defined(__x86_64__)
  if (block.kind == Kind::kAmx) {
    attend_stretch_amx(args, block, head, stretch, Then::kKeep, work);
    return;
  }
#endif
  clear(work.stretch, block.count);
  const std::int64_t first =
      std::max(first_read(work, 0, block.count) / kKvPage, stretch * kStretchPages);
  const std::int64_t end = std::min(block.last_page() + 1, (stretch + 1) * kStretchPages);
  for (std::int64_t p = first; p < end; ++p) visit_page(args, block, head, p, work);
}

HWY_INLINE PageCounts attend(const ForgettingAttentionArgs& args, const Block& block,
                             std::int64_t head, const Work& work) {
  const KvCache& cache = *args.caches[static_cast<std::size_t>(block.sequence)];
  begin_rows(args, block, head, work);
  const std::int64_t first = first_read(work, 0, block.count) / kKvPage / kStretchPages;
  const std::int64_t last = block.last_page() / kStretchPages;
#if defined(__x86_64__)
  if (block.kind == Kind::kAmx && first == last) {
    attend_stretch_amx(args, block, head, first, Then::kFinish, work);
    return count_pages(cache, block, work);
  }
#endif
  clear(work.total, block.count);
  for (std::int64_t s = first; s <= last; ++s) {
#if defined(__x86_64__)
    if (block.kind == Kind::kAmx) {
      attend_stretch_amx(args, block, head, s, Then::kAdd, work);
      continue;
    }
#endif
    attend_stretch(args, block, head, s, work);
    add_stretch(work.stretch, block.count, work.total);
  }
  finish(args, block, head, 0, block.count, work.total);
  return count_pages(cache, block, work);
}

// Blocks of up to `rows` queries of a kind with tiles, of kRows without.
std::span<Block> blocks_of(const ForgettingAttentionArgs& args, std::int64_t rows, Kind kind,
                           ScratchScope& scratch) {
  const auto with_tiles = [&](std::int64_t length) {
    const std::int64_t left = length % kTilePeriod;
    return kind == Kind::kF32 ? 0 : left < kLeastTileRows ? length - left : length;
  };
  std::int64_t count = 0;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const std::int64_t length = args.sequences.length(b);
    const std::int64_t first = with_tiles(length);
    count += (first + rows - 1) / rows + (length - first + kRows - 1) / kRows;
  }
  const std::span<Block> blocks = scratch.array<Block>(count);
  std::size_t at = 0;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const std::int64_t length = args.sequences.length(b);
    const std::int64_t first = with_tiles(length);
    const std::int64_t before = args.caches[static_cast<std::size_t>(b)]->length() - length;
    for (std::int64_t t = 0; t < length;) {
      const bool tiles = t < first;
      const std::int64_t of_block = tiles ? std::min(rows, first - t) : std::min(kRows, length - t);
      blocks[at++] = {b, args.sequences.begin(b) + t, before + t, of_block,
                      tiles ? kind : Kind::kF32};
      t += of_block;
    }
  }
  return blocks;
}

// Rows of a block: with tiles as many as leave each thread some blocks, since keys and values are
// packed for each block.
std::int64_t rows_of_block(const ForgettingAttentionArgs& args, Kind kind, int threads) {
  if (kind == Kind::kF32) return kRows;
  const std::int64_t most = kind == Kind::kAmx ? 1024 : 256;
  constexpr std::int64_t kBlocksOfThread = 6;
  const std::int64_t rows = args.q.shape[0] * args.q.shape[1] / (threads * kBlocksOfThread);
  return std::clamp(rows / kRows * kRows, kRows, most);
}

// What the two ways of running have in common.
struct Run {
  const ForgettingAttentionArgs& args;
  std::span<const Block> blocks;
  std::int64_t rows;  // of a block at most
  float* slots;       // of Work, for each thread
  std::int64_t slot_floats;
  std::atomic<std::int64_t> seen{0};
  std::atomic<std::int64_t> skipped{0};

  const KvLayout& layout() const { return args.caches[0]->layout(); }
  Work work(int slot, const Block& block) const {
    const std::int64_t of_block = block.kind == Kind::kF32 ? kRows : rows;
    return {slots + slot * slot_floats, layout(), of_block, block.kind};
  }
  void count(const PageCounts& pages) {
    seen.fetch_add(pages.seen, std::memory_order_relaxed);
    skipped.fetch_add(pages.skipped, std::memory_order_relaxed);
  }
};

void run_blocks(Context& ctx, Run& run) {
  const auto count = static_cast<std::int64_t>(run.blocks.size());
  ctx.threads().parallel_for(count * run.args.q.shape[1], [&](std::int64_t task, int slot) {
    // Blocks of a head follow one another, so that its keys and values stay in the caches. The last
    // ones of a sequence have the most keys: they go first.
    const Block& block = run.blocks[static_cast<std::size_t>(count - 1 - task % count)];
    run.count(attend(run.args, block, task / count, run.work(slot, block)));
  });
}

// The same with a task for each stretch, which are then added in order.
void run_stretches(Context& ctx, ScratchScope& scratch, Run& run) {
  struct Part {
    const Block* block;
    std::int64_t head;
    std::int64_t first;  // stretch
    std::int64_t count;
    std::int64_t index;  // of its first stretch among all
  };
  const std::int64_t heads = run.args.q.shape[1];
  const std::int64_t stride = run.layout().value_stride();
  const std::span<Part> parts =
      scratch.array<Part>(static_cast<std::int64_t>(run.blocks.size()) * heads);
  std::int64_t total = 0;
  std::size_t at = 0;
  for (const Block& block : run.blocks) {
    const KvCache& cache = *run.args.caches[static_cast<std::size_t>(block.sequence)];
    const std::int64_t first = cache.first_visible(block.position) / kKvPage / kStretchPages;
    const std::int64_t count = block.last_page() / kStretchPages + 1 - first;
    for (std::int64_t h = 0; h < heads; ++h) {
      parts[at++] = {&block, h, first, count, total};
      total += count;
    }
  }
  const std::int64_t sums_floats = Sums::floats(run.rows, stride);
  float* memory = scratch.tensor({total, sums_floats}).f32();
  const auto sums_of_stretch = [&](std::int64_t index, const Block& block) {
    return Sums(memory + index * sums_floats, run.rows, stride, block.kind == Kind::kAmx);
  };
  ctx.threads().parallel_for(total, [&](std::int64_t task, int slot) {
    const Part& part = *std::prev(
        std::upper_bound(parts.begin(), parts.end(), task,
                         [](std::int64_t index, const Part& p) { return index < p.index; }));
    const Block& block = *part.block;
    Work work = run.work(slot, block);
    work.stretch = sums_of_stretch(task, block);
    begin_rows(run.args, block, part.head, work);
    attend_stretch(run.args, block, part.head, part.first + task - part.index, work);
    if (task != part.index) return;
    run.count(count_pages(*run.args.caches[static_cast<std::size_t>(block.sequence)], block, work));
  });
  ctx.threads().parallel_for(
      static_cast<std::int64_t>(parts.size()), [&](std::int64_t i, int slot) {
        const Part& part = parts[static_cast<std::size_t>(i)];
        const Sums sum = run.work(slot, *part.block).total;
        clear(sum, part.block->count);
        for (std::int64_t s = 0; s < part.count; ++s) {
          add_stretch(sums_of_stretch(part.index + s, *part.block), part.block->count, sum);
        }
        finish(run.args, *part.block, part.head, 0, part.block->count, sum);
      });
}

}  // namespace

void forgetting_attention_target(Context& ctx, const ForgettingAttentionArgs& args) {
  const KvLayout& layout = args.caches[0]->layout();
  const int threads = ctx.threads().size();
  const Kind kind = !args.bf16_products || !isa().avx512_bf16 ? Kind::kF32
                    : isa().amx_bf16                          ? Kind::kAmx
                                                              : Kind::kBf16;
  const std::int64_t rows = rows_of_block(args, kind, threads);
  ScratchScope scratch(ctx);
  const std::int64_t slot_floats =
      std::max(Work::floats(layout, rows, kind), Work::floats(layout, kRows, Kind::kF32));
  const std::span<const Block> blocks = blocks_of(args, rows, kind, scratch);
  Run run{.args = args,
          .blocks = blocks,
          .rows = rows,
          .slots = scratch.tensor({threads, slot_floats}).f32(),
          .slot_floats = slot_floats};
  const auto tasks = static_cast<std::int64_t>(blocks.size()) * args.q.shape[1];
  const bool long_one = std::any_of(blocks.begin(), blocks.end(), [](const Block& block) {
    return block.last_page() >= kStretchPages;
  });
  if (long_one && tasks < 4 * threads) {
    run_stretches(ctx, scratch, run);
  } else {
    run_blocks(ctx, run);
  }
  ctx.statistics().attention_blocks += run.seen;
  ctx.statistics().attention_blocks_skipped += run.skipped;
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
