// See ops/forgetting_attention.h for the equations. One task is one head of keys of one sequence,
// page by page, and every query head that reads it; so sums over queries have one order. Weights
// are computed again from the softmax's maxima and sums: the forward's, or those that a first pass
// over the scores finds.
#include "ops/forgetting_attention.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forgetting_attention_backward.cc"
#include <hwy/foreach_target.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/small_gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kRows = 32;  // queries of a tile
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Memory of a task of backward: one head of keys of one sequence of L tokens, and the heads of
// queries that read it one after the other. D is rounded up to 16, L to whole pages, with zeros
// beyond.
struct BackwardWork {
  std::int64_t length, dim, stride, pages;
  float* q;             // [L, D], scaled by 1 / √D
  float* d_o;           // [L, D]
  float* dq;            // [L, D]
  float* k;             // [L, D]
  float* k_t;           // [pages, D, kKvPage]
  float* v_t;           // [pages, D, kKvPage]
  float* key_norms;     // [L] the greatest up to and with the token
  float* high;          // [L] the running sum of the log gates, as caches keep it
  float* low;           // [L] what it lacks
  float* max;           // [L] of the scores of a query, or the logarithm of their sum
  float* inverse;       // [L] 1 / its sum of weights relative to that
  float* delta;         // [L] do·o
  float* dk;            // [kKvPage, D] of a page
  float* dv;            // [kKvPage, D]
  float* scores;        // [kRows, kKvPage], then the weights
  float* dscores;       // [kRows, kKvPage]
  float* column_sums;   // [kKvPage] of dscores
  double* dsums;        // [L] the gradient of the running sums
  std::int64_t* begin;  // [L] the first position that a query reads

  static std::int64_t page_count(std::int64_t length) { return (length + kKvPage - 1) / kKvPage; }
  static std::int64_t floats(std::int64_t length, std::int64_t dim) {
    const std::int64_t stride = (dim + 15) / 16 * 16;
    const std::int64_t rows = page_count(length) * kKvPage;
    return rows * (4 * stride + 2 * dim + 10) + kKvPage * (2 * stride + 2 * kRows + 1);
  }
  BackwardWork(float* memory, std::int64_t tokens, std::int64_t head_dim)
      : length(tokens),
        dim(head_dim),
        stride((head_dim + 15) / 16 * 16),
        pages(page_count(tokens)) {
    const std::int64_t rows = pages * kKvPage;
    const auto take = [&](std::int64_t n) { return std::exchange(memory, memory + n); };
    dsums = reinterpret_cast<double*>(take(2 * rows));
    begin = reinterpret_cast<std::int64_t*>(take(2 * rows));
    for (float** of_rows : {&q, &d_o, &dq, &k}) *of_rows = take(rows * stride);
    for (float** turned : {&k_t, &v_t}) *turned = take(rows * dim);
    for (float** numbers : {&key_norms, &high, &low, &max, &inverse, &delta}) {
      *numbers = take(rows);
    }
    for (float** of_page : {&dk, &dv}) *of_page = take(kKvPage * stride);
    for (float** tile : {&scores, &dscores}) *tile = take(kKvPage * kRows);
    column_sums = take(kKvPage);
  }
};

// One head of one sequence: element d of row t is at data[t · step + d].
struct HeadView {
  const float* data;
  std::int64_t step;
};

HWY_INLINE void load_head(const BackwardWork& work, HeadView view, float scale, float* to) {
  std::fill(to, to + work.pages * kKvPage * work.stride, 0.0f);
  for (std::int64_t t = 0; t < work.length; ++t) {
    const float* from = view.data + t * view.step;
    for (std::int64_t d = 0; d < work.dim; ++d) to[t * work.stride + d] = from[d] * scale;
  }
}

// Pages with the tokens of a dimension side by side.
HWY_INLINE void turn_head(const BackwardWork& work, HeadView view, float* to) {
  std::fill(to, to + work.pages * kKvPage * work.dim, 0.0f);
  for (std::int64_t t = 0; t < work.length; ++t) {
    const float* from = view.data + t * view.step;
    float* page = to + t / kKvPage * kKvPage * work.dim + t % kKvPage;
    for (std::int64_t d = 0; d < work.dim; ++d) page[d * kKvPage] = from[d];
  }
}

HWY_INLINE void load_gates(const BackwardWork& work, HeadView log_gates) {
  double sum = 0;
  for (std::int64_t t = 0; t < work.length; ++t) {
    sum += log_gates.data[t * log_gates.step];
    work.high[t] = static_cast<float>(sum);
    work.low[t] = static_cast<float>(sum - work.high[t]);
    sum = static_cast<double>(work.high[t]) + work.low[t];
  }
}

HWY_INLINE void load_key_norms(const BackwardWork& work) {
  float norm = 0;
  for (std::int64_t t = 0; t < work.length; ++t) {
    norm = std::max(norm, std::sqrt(sum_of_squares(work.k + t * work.stride, work.dim)));
    work.key_norms[t] = norm;
  }
}

// Σ log f from behind key j up to query i
HWY_INLINE float decay_between(const BackwardWork& work, std::int64_t i, std::int64_t j) {
  return (work.high[i] - work.high[j]) + (work.low[i] - work.low[j]);
}

// As first_kept_page of the forward.
HWY_INLINE std::int64_t first_kept(const BackwardWork& work, std::int64_t i,
                                   std::int64_t first_visible, float threshold) {
  std::int64_t low = first_visible / kKvPage;
  std::int64_t high = i / kKvPage;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (decay_between(work, i, middle * kKvPage + kKvPage - 1) < threshold) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return std::max(first_visible, low * kKvPage);
}

HWY_INLINE void find_begins(const ForgettingAttentionBackwardArgs& args, const BackwardWork& work,
                            std::int64_t head) {
  const bool prunes = args.log_pruning_tolerance && args.log_gates.data != nullptr;
  for (std::int64_t i = 0; i < work.length; ++i) {
    const std::int64_t visible = args.window ? std::max<std::int64_t>(0, i + 1 - *args.window) : 0;
    work.begin[i] = visible;
    if (!prunes) continue;
    const float bound =
        args.score_bounds.empty()
            ? std::sqrt(sum_of_squares(work.q + i * work.stride, work.dim)) * work.key_norms[i]
            : args.score_bounds[static_cast<std::size_t>(head)];
    const float threshold =
        *args.log_pruning_tolerance - 2 * bound - std::log(static_cast<float>(i + 1));
    work.begin[i] = first_kept(work, i, visible, threshold);
  }
}

// Whether one of the `count` queries from `row` on reads page p.
HWY_INLINE bool reads_page(const BackwardWork& work, std::int64_t row, std::int64_t count,
                           std::int64_t p) {
  if (row + count <= p * kKvPage) return false;
  const std::int64_t first = *std::min_element(work.begin + row, work.begin + row + count);
  return first < (p + 1) * kKvPage;
}

// The scores of `count` queries from `row` on and the keys of page p, −∞ where a query does not
// read a key.
HWY_INLINE void score_tile(const BackwardWork& work, std::int64_t row, std::int64_t count,
                           std::int64_t p, bool gated) {
  std::fill(work.scores, work.scores + count * kKvPage, 0.0f);
  small_gemm(count, kKvPage, work.dim, {work.q + row * work.stride, work.stride, 1},
             work.k_t + p * kKvPage * work.dim, kKvPage, work.scores, kKvPage);
  const std::int64_t first = p * kKvPage;
  for (std::int64_t i = row; i < row + count; ++i) {
    float* scores = work.scores + (i - row) * kKvPage;
    for (std::int64_t j = 0; gated && j < kKvPage; j += lanes()) {
      const VF32 high = hn::Sub(hn::Set(kF32, work.high[i]), load(work.high + first + j));
      const VF32 low = hn::Sub(hn::Set(kF32, work.low[i]), load(work.low + first + j));
      store(hn::Add(load(scores + j), hn::Add(high, low)), scores + j);
    }
    const std::int64_t begin = std::clamp<std::int64_t>(work.begin[i] - first, 0, kKvPage);
    const std::int64_t end = std::clamp<std::int64_t>(i + 1 - first, begin, kKvPage);
    std::fill(scores, scores + begin, kMinusInfinity);
    std::fill(scores + end, scores + kKvPage, kMinusInfinity);
  }
}

// The maxima and sums of the softmax of `count` queries from `row` on.
HWY_INLINE void softmax_statistics(const BackwardWork& work, std::int64_t row, std::int64_t count,
                                   bool gated) {
  double sums[kRows] = {};
  std::fill(work.max + row, work.max + row + count, kMinusInfinity);
  for (std::int64_t p = 0; p <= (row + count - 1) / kKvPage; ++p) {
    if (!reads_page(work, row, count, p)) continue;
    score_tile(work, row, count, p, gated);
    for (std::int64_t r = 0; r < count; ++r) {
      const float* scores = work.scores + r * kKvPage;
      VF32 maxima = load(scores);
      for (std::int64_t j = lanes(); j < kKvPage; j += lanes()) {
        maxima = hn::Max(maxima, load(scores + j));
      }
      const float max = hn::GetLane(hn::MaxOfLanes(kF32, maxima));
      if (max == kMinusInfinity) continue;
      float& known = work.max[row + r];
      if (max > known) {
        sums[r] *= std::exp(known - max);
        known = max;
      }
      VF32 sum = hn::Zero(kF32);
      for (std::int64_t j = 0; j < kKvPage; j += lanes()) {
        sum = hn::Add(sum, hn::Exp(kF32, hn::Sub(load(scores + j), hn::Set(kF32, known))));
      }
      sums[r] += sum_of(sum);
    }
  }
  for (std::int64_t r = 0; r < count; ++r) work.inverse[row + r] = static_cast<float>(1 / sums[r]);
}

// What the queries from `row` on give to page p, and it to them.
HWY_INLINE void tile_backward(const BackwardWork& work, std::int64_t row, std::int64_t count,
                              std::int64_t p, bool gated) {
  const std::int64_t stride = work.stride;
  score_tile(work, row, count, p, gated);
  std::fill(work.dscores, work.dscores + count * kKvPage, 0.0f);
  small_gemm(count, kKvPage, work.dim, {work.d_o + row * stride, stride, 1},
             work.v_t + p * kKvPage * work.dim, kKvPage, work.dscores, kKvPage);
  for (std::int64_t r = 0; r < count; ++r) {
    const VF32 max = hn::Set(kF32, work.max[row + r]);
    const VF32 inverse = hn::Set(kF32, work.inverse[row + r]);
    const VF32 delta = hn::Set(kF32, work.delta[row + r]);
    VF32 row_sum = hn::Zero(kF32);
    for (std::int64_t j = 0; j < kKvPage; j += lanes()) {
      float* weights = work.scores + r * kKvPage + j;
      float* dscores = work.dscores + r * kKvPage + j;
      const VF32 weight = hn::Mul(hn::Exp(kF32, hn::Sub(load(weights), max)), inverse);
      const VF32 d = hn::Mul(weight, hn::Sub(load(dscores), delta));
      store(weight, weights);
      store(d, dscores);
      row_sum = hn::Add(row_sum, d);
      store(hn::Add(load(work.column_sums + j), d), work.column_sums + j);
    }
    work.dsums[row + r] += sum_of(row_sum);
  }
  small_gemm(kKvPage, stride, count, {work.scores, 1, kKvPage}, work.d_o + row * stride, stride,
             work.dv, stride);
  small_gemm(kKvPage, stride, count, {work.dscores, 1, kKvPage}, work.q + row * stride, stride,
             work.dk, stride);
  small_gemm(count, stride, kKvPage, {work.dscores, kKvPage, 1}, work.k + p * kKvPage * stride,
             stride, work.dq + row * stride, stride);
}

// Rows of a page or a sequence into [·, heads, D]: = or +=.
HWY_INLINE void store_rows(const float* from, std::int64_t stride, std::int64_t rows,
                           std::int64_t dim, float scale, bool add, float* to, std::int64_t step) {
  for (std::int64_t t = 0; t < rows; ++t) {
    for (std::int64_t d = 0; d < dim; ++d) {
      const float value = scale * from[t * stride + d];
      to[t * step + d] = add ? to[t * step + d] + value : value;
    }
  }
}

// Query head `head` of sequence b; `first` is the first head of those that read the same keys.
HWY_INLINE void query_head_backward(const ForgettingAttentionBackwardArgs& args,
                                    const BackwardWork& work, std::int64_t b, std::int64_t head,
                                    std::int64_t group, bool first) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t kv_heads = args.k.shape[1];
  const std::int64_t step = heads * work.dim;
  const std::int64_t at = args.sequences.begin(b) * step + head * work.dim;
  const bool gated = args.log_gates.data != nullptr;
  const float scale = 1 / std::sqrt(static_cast<float>(work.dim));
  load_head(work, {args.q.f32() + at, step}, scale, work.q);
  load_head(work, {args.d_o.f32() + at, step}, 1, work.d_o);
  std::fill(work.dq, work.dq + work.pages * kKvPage * work.stride, 0.0f);
  std::fill(work.dsums, work.dsums + work.length, 0.0);
  std::fill(work.high, work.high + 2 * work.pages * kKvPage, 0.0f);  // and low
  const std::int64_t gate_at = args.sequences.begin(b) * heads + head;
  if (gated) load_gates(work, {args.log_gates.f32() + gate_at, heads});
  find_begins(args, work, head);
  if (args.lse.data != nullptr) {
    for (std::int64_t i = 0; i < work.length; ++i) {
      work.max[i] = args.lse.f32()[gate_at + i * heads];
      work.inverse[i] = 1;
    }
  } else {
    for (std::int64_t row = 0; row < work.length; row += kRows) {
      softmax_statistics(work, row, std::min(kRows, work.length - row), gated);
    }
  }
  for (std::int64_t i = 0; i < work.length; ++i) {
    const float* o = args.o.f32() + at + i * step;
    double sum = 0;
    for (std::int64_t d = 0; d < work.dim; ++d) {
      sum += static_cast<double>(o[d]) * work.d_o[i * work.stride + d];
    }
    work.delta[i] = static_cast<float>(sum);
  }
  for (std::int64_t p = 0; p < work.pages; ++p) {
    std::fill(work.dk, work.dk + 2 * kKvPage * work.stride, 0.0f);  // and dv
    std::fill(work.column_sums, work.column_sums + kKvPage, 0.0f);
    for (std::int64_t row = p * kKvPage; row < work.length; row += kRows) {
      const std::int64_t count = std::min(kRows, work.length - row);
      if (reads_page(work, row, count, p)) tile_backward(work, row, count, p, gated);
    }
    const std::int64_t keys = std::min(kKvPage, work.length - p * kKvPage);
    const std::int64_t kv_step = kv_heads * work.dim;
    const std::int64_t kv_at = (args.sequences.begin(b) + p * kKvPage) * kv_step + group * work.dim;
    store_rows(work.dk, work.stride, keys, work.dim, 1, !first, args.dk.f32() + kv_at, kv_step);
    store_rows(work.dv, work.stride, keys, work.dim, 1, !first, args.dv.f32() + kv_at, kv_step);
    for (std::int64_t j = 0; j < keys; ++j) {
      work.dsums[p * kKvPage + j] -= static_cast<double>(work.column_sums[j]);
    }
  }
  store_rows(work.dq, work.stride, work.length, work.dim, scale, false, args.dq.f32() + at, step);
  double later = 0;
  for (std::int64_t i = work.length - 1; gated && i >= 0; --i) {
    later += work.dsums[i];
    args.dlog_gates.f32()[gate_at + i * heads] = static_cast<float>(later);
  }
}

}  // namespace

void forgetting_attention_backward_target(Context& ctx,
                                          const ForgettingAttentionBackwardArgs& args) {
  const std::int64_t kv_heads = args.k.shape[1];
  const std::int64_t shared = args.q.shape[1] / kv_heads;
  const std::int64_t dim = args.k.shape[2];
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    longest = std::max(longest, args.sequences.length(b));
  }
  ScratchScope scratch(ctx);
  const std::int64_t slot_floats = (BackwardWork::floats(longest, dim) + 15) / 16 * 16;
  float* slots = scratch.tensor({ctx.threads().size(), slot_floats}).f32();
  ctx.threads().parallel_for(args.sequences.count() * kv_heads, [&](std::int64_t task, int slot) {
    const std::int64_t b = task / kv_heads;
    const std::int64_t group = task % kv_heads;
    const BackwardWork work(slots + slot * slot_floats, args.sequences.length(b), dim);
    const std::int64_t at = (args.sequences.begin(b) * kv_heads + group) * dim;
    const HeadView keys{args.k.f32() + at, kv_heads * dim};
    load_head(work, keys, 1, work.k);
    turn_head(work, keys, work.k_t);
    turn_head(work, {args.v.f32() + at, kv_heads * dim}, work.v_t);
    load_key_norms(work);
    for (std::int64_t i = 0; i < shared; ++i) {
      query_head_backward(args, work, b, group * shared + i, group, i == 0);
    }
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(forgetting_attention_backward_target);
void forgetting_attention_backward(Context& ctx, const ForgettingAttentionBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(forgetting_attention_backward_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
