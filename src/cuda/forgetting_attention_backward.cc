#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cuda/attention_backward.cuh"
#include "cuda/check.h"
#include "cuda/kv_batch.h"
#include "ops/forgetting_attention.h"

namespace deltafox::cuda {
namespace {

constexpr const char* kName = "forgetting_attention_backward";

struct Work {
  std::vector<AttentionSequence> sequences;  // not the empty ones
  std::vector<AttentionBlock> blocks;
  std::vector<AttentionRows> key_rows;    // the longest first
  std::vector<AttentionRows> query_rows;  // the longest first
};

Work work_of(const Sequences& sequences, int row_blocks) {
  Work work;
  for (std::int64_t b = 0; b < sequences.count(); ++b) {
    const auto length = static_cast<std::int32_t>(sequences.length(b));
    if (length == 0) continue;
    const auto row = static_cast<std::int32_t>(sequences.begin(b));
    const auto first = static_cast<std::int32_t>(work.blocks.size());
    const std::int32_t end = first + (length + kBlockTokens - 1) / kBlockTokens;
    work.sequences.push_back({.row = row, .length = length, .first = first, .end = end});
    for (std::int32_t i = first; i < end; ++i) {
      const std::int32_t position = (i - first) * kBlockTokens;
      work.blocks.push_back({.row = row + position,
                             .count = std::min(kBlockTokens, length - position),
                             .position = position,
                             .first = first,
                             .end = end});
    }
    for (std::int32_t i = first; i < end; i += row_blocks) {
      work.query_rows.push_back({.block = i, .count = std::min(row_blocks, end - i)});
    }
  }
  work.key_rows = work.query_rows;
  const auto sort_by_columns = [&](std::vector<AttentionRows>& rows, const auto& columns) {
    std::stable_sort(rows.begin(), rows.end(), [&](const auto& a, const auto& b) {
      return columns(a.block) > columns(b.block);
    });
  };
  const auto block = [&](std::int32_t i) { return work.blocks[static_cast<std::size_t>(i)]; };
  sort_by_columns(work.key_rows, [&](std::int32_t i) { return block(i).end - i; });
  sort_by_columns(work.query_rows, [&](std::int32_t i) { return i - block(i).first; });
  return work;
}

bool all_of_dtype(const ForgettingAttentionBackwardArgs& args, DType dtype) {
  const DType dtypes[] = {args.q.dtype,   args.k.dtype,  args.v.dtype,  args.o.dtype,
                          args.d_o.dtype, args.dq.dtype, args.dk.dtype, args.dv.dtype};
  return std::all_of(std::begin(dtypes), std::end(dtypes),
                     [&](DType other) { return other == dtype; });
}

}  // namespace

void forgetting_attention_backward(Context& ctx, const ForgettingAttentionBackwardArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t kv_heads = args.k.shape[1];
  const std::int64_t dim = args.q.shape[2];
  if (args.sequences.tokens() == 0) return;
  if (dim > kMaxHeadDim) fail("{}: CUDA has heads of at most {}, not {}", kName, kMaxHeadDim, dim);
  if (args.lse.data == nullptr) fail("{}: CUDA needs the forward's lse", kName);
  if (!all_of_dtype(args, args.q.dtype)) fail("{}: activations of several dtypes", kName);
  const bool bf16 = args.q.dtype == DType::kBF16;
  const bool sm90 = bf16 && ctx.stream().major() == 9;
  const bool gated = args.log_gates.data != nullptr;
  const bool prunes = gated && args.log_pruning_tolerance.has_value();
  const Work work = work_of(args.sequences, attention_row_blocks(sm90));
  const auto blocks = static_cast<std::int64_t>(work.blocks.size());
  const std::int64_t rows = blocks * kBlockTokens;

  ScratchScope scratch(ctx);
  const auto floats = [&](const Shape& shape) { return scratch.tensor(shape).f32(); };
  const auto tiles = [&](std::int64_t count) {
    return static_cast<std::byte*>(
        scratch.tensor({count, blocks, attention_tile_bytes(dim)}, DType::kU8).data);
  };
  AttentionBackwardParams params{
      .q = args.q.data,
      .k = args.k.data,
      .v = args.v.data,
      .o = args.o.data,
      .d_o = args.d_o.data,
      .lse = args.lse.f32(),
      .log_gates = gated ? args.log_gates.f32() : nullptr,
      .dq = args.dq.data,
      .dk = args.dk.data,
      .dv = args.dv.data,
      .dlog_gates = gated ? args.dlog_gates.f32() : nullptr,
      .heads = static_cast<std::int32_t>(heads),
      .kv_heads = static_cast<std::int32_t>(kv_heads),
      .dim = static_cast<std::int32_t>(dim),
      .window = static_cast<std::int32_t>(args.window.value_or(0)),
      .scale = 1 / std::sqrt(static_cast<float>(dim)),
      .log_tolerance = args.log_pruning_tolerance.value_or(-std::numeric_limits<float>::infinity()),
      .score_bounds = nullptr,
      .sequences = nullptr,
      .sequence_count = static_cast<std::int32_t>(work.sequences.size()),
      .blocks = nullptr,
      .block_count = static_cast<std::int32_t>(blocks),
      .gate_sums = static_cast<double*>(scratch.tensor({heads, blocks}, DType::kI64).data),
      .query_terms = floats({heads, rows}),
      .key_terms = floats({heads, rows}),
      .deltas = floats({heads, rows}),
      .key_norms = nullptr,
      .norms_before = nullptr,
      .begins = static_cast<std::int32_t*>(scratch.tensor({heads, rows}, DType::kI32).data),
      .ranges = static_cast<GroupRange*>(scratch.tensor({heads, blocks, 2}, DType::kI32).data),
      .query_sums = floats({heads, rows}),
      .key_sums = floats({heads, rows}),
      .q_tiles = nullptr,
      .k_tiles = nullptr,
      .v_tiles = nullptr,
      .d_o_tiles = nullptr,
      .key_rows = nullptr,
      .query_rows = nullptr,
      .rows_count = static_cast<std::int32_t>(work.key_rows.size()),
      .next_turn = nullptr,
  };
  if (prunes && args.score_bounds.empty()) {
    params.key_norms = floats({kv_heads, rows});
    params.norms_before = floats({kv_heads, blocks});
  }
  if (bf16) {
    params.q_tiles = tiles(heads);
    params.k_tiles = tiles(kv_heads);
    params.v_tiles = tiles(kv_heads);
    params.d_o_tiles = tiles(heads);
    params.next_turn = static_cast<std::int32_t*>(scratch.tensor({2}, DType::kI32).data);
  }
  upload_together(ctx, [&] {
    params.sequences = upload(ctx, std::span(work.sequences));
    params.blocks = upload(ctx, std::span(work.blocks));
    params.key_rows = upload(ctx, std::span(work.key_rows));
    params.query_rows = upload(ctx, std::span(work.query_rows));
    if (!args.score_bounds.empty()) params.score_bounds = upload(ctx, args.score_bounds);
  });
  launch_attention_backward_plan(params, bf16, stream_of(ctx));
  check_launch(kName);
  if (bf16) {
    launch_attention_backward_bf16(params, sm90, ctx.stream().multiprocessors(), stream_of(ctx));
  } else {
    launch_attention_backward_f32(params, stream_of(ctx));
  }
  check_launch(kName);
  if (gated) {
    launch_attention_backward_gates(params, stream_of(ctx));
    check_launch(kName);
  }
}

}  // namespace deltafox::cuda
