#include "ops/forgetting_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/attention_kernels.cuh"
#include "cuda/check.h"
#include "cuda/kv_batch.h"

namespace deltafox::cuda {
namespace {

// Keys and values of heads that are attended to at the same time should fit the L2 cache.
constexpr std::int64_t kL2Bytes = std::int64_t{32} << 20;

std::int64_t heads_per_turn(const ForgettingAttentionArgs& args) {
  const KvLayout& layout = args.caches[0]->layout();
  const std::int64_t heads = args.q.shape[1];
  std::int64_t length = 0;
  for (const KvCache* cache : args.caches) length = std::max(length, cache->length());
  const std::int64_t head_bytes =
      length * 2 * padded_dim(layout.head_dim) * static_cast<std::int64_t>(size_of(layout.dtype));
  std::int64_t best = 1;
  for (std::int64_t h = 1; h <= heads; ++h) {
    if (heads % h == 0 && h * head_bytes <= kL2Bytes) best = h;
  }
  return best;
}

struct Work {
  std::vector<AttentionTile> tiles;  // the longest first
  std::vector<std::int32_t> single;  // sequences of one row, unless lse is asked for
  std::int64_t max_splits = 0;
};

Work work_of(const ForgettingAttentionArgs& args, int tile_rows) {
  Work work;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const std::int64_t rows = args.sequences.length(b);
    const std::int64_t length = args.caches[static_cast<std::size_t>(b)]->length();
    if (rows == 1 && args.lse.data == nullptr) {
      work.single.push_back(static_cast<std::int32_t>(b));
      const auto cache = args.caches.subspan(static_cast<std::size_t>(b), 1);
      work.max_splits = std::max(work.max_splits, most_splits(cache));
      continue;
    }
    for (std::int64_t r = 0; r < rows; r += tile_rows) {
      work.tiles.push_back(
          {.sequence = static_cast<std::int32_t>(b),
           .row = static_cast<std::int32_t>(args.sequences.begin(b) + r),
           .position = static_cast<std::int32_t>(length - rows + r),
           .count = static_cast<std::int32_t>(std::min<std::int64_t>(tile_rows, rows - r))});
    }
  }
  std::stable_sort(
      work.tiles.begin(), work.tiles.end(),
      [](const AttentionTile& a, const AttentionTile& b) { return a.position > b.position; });
  return work;
}

}  // namespace

void forgetting_attention(Context& ctx, const ForgettingAttentionArgs& args) {
  const KvLayout& layout = args.caches[0]->layout();
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t tokens = args.q.shape[0];
  if (args.q.dtype != layout.dtype || args.o.dtype != layout.dtype) {
    fail("forgetting_attention: queries of dtype {} do not fit a cache of {}",
         name_of(args.q.dtype), name_of(layout.dtype));
  }
  const bool bf16 = layout.dtype == DType::kBF16;
  const bool sm90 = bf16 && ctx.stream().major() == 9;
  const int tile_rows = attention_tile_rows(padded_dim(layout.head_dim), sm90);
  const Work work = work_of(args, tile_rows);
  const auto tile_count = static_cast<std::int64_t>(work.tiles.size());
  const auto single_count = static_cast<std::int64_t>(work.single.size());

  ScratchScope scratch(ctx);
  AttentionParams params{
      .q = args.q.data,
      .o = args.o.data,
      .lse = static_cast<float*>(args.lse.data),
      .layout = page_layout("forgetting_attention", layout),
      .heads = static_cast<std::int32_t>(heads),
      .window = static_cast<std::int32_t>(layout.window.value_or(0)),
      .scale = 1 / std::sqrt(static_cast<float>(layout.head_dim)),
      .log_tolerance = args.log_pruning_tolerance.value_or(-std::numeric_limits<float>::infinity()),
      .tile_count = static_cast<std::int32_t>(tile_count),
      .heads_per_turn = static_cast<std::int32_t>(heads_per_turn(args)),
      .tokens = static_cast<std::int32_t>(tokens),
      .single_count = static_cast<std::int32_t>(single_count),
      .max_splits = static_cast<std::int32_t>(work.max_splits),
  };
  upload_together(ctx, [&] {
    params.sequences = upload_sequences(ctx, args.sequences, args.caches);
    params.tiles = upload(ctx, std::span(work.tiles));
    params.single = upload(ctx, std::span(work.single));
    if (!args.score_bounds.empty()) params.score_bounds = upload(ctx, args.score_bounds);
  });
  if (tile_count > 0) {
    params.begins = static_cast<std::int32_t*>(scratch.tensor({heads, tokens}, DType::kI32).data);
    params.ranges = static_cast<GroupRange*>(
        scratch.tensor({tile_count, heads, tile_rows / kQueryGroup, 2}, DType::kI32).data);
    params.next_turn = static_cast<std::int32_t*>(scratch.tensor({1}, DType::kI32).data);
    launch_attention_plan(params, bf16, tile_rows, stream_of(ctx));
    check_launch("forgetting_attention");
    if (!bf16) {
      launch_attention_f32(params, stream_of(ctx));
    } else if (sm90) {
      launch_attention_bf16_sm90(params, ctx.stream().multiprocessors(), stream_of(ctx));
    } else {
      launch_attention_bf16_sm80(params, stream_of(ctx));
    }
    check_launch("forgetting_attention");
  }
  if (single_count > 0) attend_to_last(ctx, params, bf16);
}

void attend_to_last(Context& ctx, AttentionParams params, bool bf16) {
  ScratchScope scratch(ctx);
  const std::int64_t count = params.single_count;
  const std::int64_t partial = padded_dim(params.layout.dim) + 2;
  params.recorded_runs = ctx.recorded_runs();
  params.partials = scratch.tensor({count, params.heads, params.max_splits, partial}).f32();
  params.arrivals = ctx.stream().zeros(count * params.heads);
  launch_attention_decode(ctx, params, bf16);
}

}  // namespace deltafox::cuda
