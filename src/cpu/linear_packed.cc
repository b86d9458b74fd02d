// y = x wᵀ for packed weights. Rows of x become integers with a scale for each block of 256
// columns; products of a block are exact integers; blocks are added in order, as float32. So every
// kernel gives the same bits, for any number of tokens and threads.
#include "cpu/isa.h"
#include "cpu/linear_kernels.h"
#include "cpu/packed_kernels.h"
#include "cpu/shrinking_tasks.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/linear_packed.cc"
#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

constexpr std::int64_t kGroupsOfBlock = kQuantBlock / kQuantGroup;

// A block of x: q = x · (127 / max|x|), rounded to the nearest even. offset and group_sums may be
// null.
HWY_INLINE void quantize_block(const float* x, std::int64_t size, std::int8_t* q, float* scale,
                               std::int32_t* offset, std::int16_t* group_sums) {
  VF32 largest = hn::Zero(kF32);
  for_row(
      size, [&](std::int64_t i) HWY_ATTR { largest = hn::Max(largest, hn::Abs(load(x + i))); },
      [&](std::int64_t i, std::int64_t n)
          HWY_ATTR { largest = hn::Max(largest, hn::Abs(load_first(x + i, n))); });
  const float max = hn::GetLane(hn::MaxOfLanes(kF32, largest));
  *scale = max / 127;
  const VF32 inverse = hn::Set(kF32, max > 1e-30F ? 127 / max : 0.0F);
  const hn::Rebind<std::int32_t, F32> wide;
  const hn::Rebind<std::int8_t, F32> narrow;
  auto sums = hn::Zero(wide);
  int before = 0;
  for (std::int64_t g = 0; g < kGroupsOfBlock; ++g) {
    const std::int64_t begin = g * kQuantGroup;
    const auto rounded = [&](VF32 v) HWY_ATTR {
      const auto integers = hn::NearestInt(hn::Mul(v, inverse));
      if (offset != nullptr) sums = hn::Add(sums, integers);
      return hn::DemoteTo(narrow, integers);
    };
    for_row(
        std::clamp<std::int64_t>(size - begin, 0, kQuantGroup),
        [&](std::int64_t i)
            HWY_ATTR { hn::StoreU(rounded(load(x + begin + i)), narrow, q + begin + i); },
        [&](std::int64_t i, std::int64_t n) HWY_ATTR {
          HWY_ALIGN std::int8_t last[16];
          hn::StoreU(rounded(load_first(x + begin + i, n)), narrow, last);
          std::copy_n(last, n, q + begin + i);
        });
    if (group_sums != nullptr) {
      const int sum = hn::GetLane(hn::SumOfLanes(wide, sums));
      group_sums[g] = static_cast<std::int16_t>(sum - before);
      before = sum;
    }
  }
  if (offset != nullptr) *offset = 128 * hn::GetLane(hn::SumOfLanes(wide, sums));
}

// Scales and offsets are `stride` apart from block to block.
void quantize_row_target(const float* x, std::int64_t size, std::int8_t* q, float* scales,
                         std::int32_t* offsets, std::int64_t stride, std::int16_t* group_sums) {
  for (std::int64_t b = 0; b * kQuantBlock < size; ++b) {
    const std::int64_t begin = b * kQuantBlock;
    quantize_block(x + begin, std::min(kQuantBlock, size - begin), q + begin, scales + b * stride,
                   offsets == nullptr ? nullptr : offsets + b * stride,
                   group_sums == nullptr ? nullptr : group_sums + b * kGroupsOfBlock);
  }
}

// y[token, column] = sums [+ y], from rows of row_floats
void store_sums_target(const float* sums, std::int64_t row_floats, std::int64_t tokens,
                       std::int64_t columns, float* y, std::int64_t stride, bool accumulate) {
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float* from = sums + t * row_floats;
    float* to = y + t * stride;
    for_vectors(columns, [&](std::int64_t n, auto&& load_vector, auto&& store_vector) HWY_ATTR {
      const VF32 sum = load_vector(from + n);
      store_vector(accumulate ? hn::Add(load_vector(to + n), sum) : sum, to + n);
    });
  }
}

void store_glu_target(const float* gate, const float* up, std::int64_t row_floats,
                      std::int64_t tokens, std::int64_t columns, Activation activation, float* y,
                      std::int64_t stride) {
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t from = t * row_floats;
    for (std::int64_t n = 0; n < columns; n += lanes()) {
      store(hn::Mul(activate(activation, load(gate + from + n)), load(up + from + n)),
            y + t * stride + n);
    }
  }
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(quantize_row_target);
HWY_EXPORT(store_sums_target);
HWY_EXPORT(store_glu_target);

void store_glu(const float* gate, const float* up, std::int64_t row_floats, std::int64_t tokens,
               std::int64_t columns, Activation activation, float* y, std::int64_t stride) {
  HWY_DYNAMIC_DISPATCH(store_glu_target)
  (gate, up, row_floats, tokens, columns, activation, y, stride);
}

namespace {

PackedKernels kernels() {
#if defined(__x86_64__)
  if (isa().amx_int8) {
    return {.few_eight_bits = avx512::few_eight_bits,
            .few_four_bits = avx512::few_four_bits,
            .many_eight_bits = amx::many_eight_bits,
            .many_four_bits = amx::many_four_bits};
  }
  if (isa().avx512_vnni) {
    return {.eight_bits = avx512::eight_bits,
            .expand = avx512::expand,
            .few_eight_bits = avx512::few_eight_bits,
            .few_four_bits = avx512::few_four_bits};
  }
  if (isa().avx2) return {.eight_bits = avx2::eight_bits, .expand = avx2::expand};
#endif
  return {.eight_bits = plain::eight_bits, .expand = plain::expand};
}

constexpr std::int64_t kBlockTokens = 256;  // their sums and integers stay in the caches

// With sums of the integers where kernels read them: offsets, and those of groups for a few tokens.
QuantizedRows quantized(Context& ctx, ScratchScope& scratch, const ConstTensorView& x,
                        const PackedLayout& layout, bool with_offsets) {
  const std::int64_t tokens = x.shape[0];
  const std::int64_t depth = x.shape[1];
  const std::int64_t blocks = layout.blocks();
  const std::int64_t groups = blocks * (kQuantBlock / kQuantGroup);
  // Not a multiple of 4096: rows must not compete for the same sets of the first-level cache.
  const std::int64_t stride = layout.columns() + 64;
  std::int8_t* q = scratch.array<std::int8_t>(tokens * stride).data();
  float* scales = scratch.array<float>(tokens * blocks).data();
  std::int32_t* offsets =
      with_offsets ? scratch.array<std::int32_t>(tokens * blocks).data() : nullptr;
  std::int16_t* group_sums =
      tokens <= kFewTokens ? scratch.array<std::int16_t>(tokens * groups).data() : nullptr;
  const auto row = HWY_DYNAMIC_DISPATCH(quantize_row_target);
  // Whole cache lines of scales, where there are many tokens.
  const std::int64_t rows_of_task = tokens >= 16 * 2 * ctx.threads().size() ? 16 : 4;
  ctx.threads().parallel_for((tokens + rows_of_task - 1) / rows_of_task, [&](std::int64_t task) {
    const std::int64_t end = std::min(tokens, (task + 1) * rows_of_task);
    for (std::int64_t t = task * rows_of_task; t < end; ++t) {
      row(x.f32() + t * depth, depth, q + t * stride, scales + t,
          offsets == nullptr ? nullptr : offsets + t, tokens,
          group_sums == nullptr ? nullptr : group_sums + t * groups);
      std::fill(q + t * stride + depth, q + (t + 1) * stride, std::int8_t{0});
    }
  });
  return {q, stride, scales, offsets, group_sums, tokens, blocks};
}

// Products with w, whose rows are one part or the two of a gated unit, and what becomes of them:
// y [+]= x wᵀ, or y = act(x gateᵀ) · (x upᵀ).
struct Job {
  ConstTensorView x;
  ConstTensorView w;
  TensorView y;
  bool accumulate;
  bool gated;
  Activation activation;

  std::int64_t parts() const { return gated ? 2 : 1; }
};

// For some panels of each part, from rows of row_floats. Sums of the second part begin at `up`.
void store_panels(const Job& job, const float* sums, const float* up, std::int64_t row_floats,
                  std::int64_t token, std::int64_t tokens, std::int64_t panel,
                  std::int64_t panels) {
  const std::int64_t stride = job.y.shape[1];
  const std::int64_t column = panel * kPanelRows;
  const std::int64_t columns = std::min(panels * kPanelRows, stride - column);
  float* y = job.y.f32() + token * stride + column;
  if (job.gated) {
    store_glu(sums, up, row_floats, tokens, columns, job.activation, y, stride);
  } else {
    HWY_DYNAMIC_DISPATCH(store_sums_target)
    (sums, row_floats, tokens, columns, y, stride, job.accumulate);
  }
}

// As much as kernels fetch ahead themselves.
void fetch_ahead(const std::byte* at) {
  constexpr std::int64_t kBytes = 2048;
  for (std::int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// Up to kFewTokens tokens: each panel is read once, in order, beside the others of its task.
void few_tokens(Context& ctx, const Job& job, const PackedLayout& layout, const QuantizedRows& x,
                void (*kernel)(const PackedPanels&)) {
  const std::int64_t part_panels = layout.panels() / job.parts();
  ScratchScope scratch(ctx);
  const std::span<const std::int64_t> begins =
      shrinking_tasks(scratch, part_panels, ctx.threads().size());
  const std::int64_t tokens = job.x.shape[0];
  const auto panel_at = [&](std::int64_t part, std::int64_t panel) {
    return static_cast<const std::byte*>(job.w.data) +
           (part * part_panels + panel) * layout.panel_bytes();
  };
  ctx.threads().parallel_for(static_cast<std::int64_t>(begins.size()) - 1, [&](std::int64_t task) {
    alignas(64) float sums[2][kFewTokens * kTileColumns];
    const std::int64_t end = begins[static_cast<std::size_t>(task + 1)];
    for (std::int64_t panel = begins[static_cast<std::size_t>(task)]; panel < end;
         panel += kMaxPanels) {
      const std::int64_t panels = std::min<std::int64_t>(kMaxPanels, end - panel);
      for (std::int64_t part = 0; part < job.parts(); ++part) {
        // A gated unit goes on elsewhere, at a place that is on its way when these panels end.
        if (job.gated) fetch_ahead(panel_at(1 - part, panel + part * kMaxPanels));
        kernel({.x = &x,
                .token = 0,
                .tokens = tokens,
                .layout = &layout,
                .first = panel_at(part, panel),
                .panels = static_cast<int>(panels),
                .next = nullptr,
                .sums = sums[part]});
      }
      store_panels(job, sums[0], sums[1], kTileColumns, 0, tokens, panel, panels);
    }
  });
}

// By a kernel that takes panels as they lie in memory.
void many_tokens(Context& ctx, const Job& job, const PackedLayout& layout, const QuantizedRows& x,
                 ScratchScope& scratch, void (*kernel)(const PackedPanels&)) {
  // Integers of a block of tokens stay in the second-level cache while weights pass by.
  constexpr std::int64_t kIntegerBytes = std::int64_t{1} << 20;
  constexpr std::int64_t kSumColumns = kTilePanels * kPanelRows;
  const std::int64_t tokens = job.x.shape[0];
  const std::int64_t block_tokens =
      std::min(tokens, std::clamp<std::int64_t>(kIntegerBytes / layout.columns() / 32 * 32,
                                                kBlockTokens, 2 * kBlockTokens));
  const std::int64_t token_blocks = (tokens + block_tokens - 1) / block_tokens;
  const std::int64_t part_panels = layout.panels() / job.parts();
  const std::int64_t tiles = (part_panels + kTilePanels - 1) / kTilePanels;
  const std::int64_t part_floats = block_tokens * kSumColumns;
  float* slots = scratch.array<float>(ctx.threads().size() * job.parts() * part_floats).data();
  const auto panel_at = [&](std::int64_t part, std::int64_t tile) {
    return static_cast<const std::byte*>(job.w.data) +
           (part * part_panels + tile * kTilePanels) * layout.panel_bytes();
  };
  const std::span<const std::int64_t> begins =
      shrinking_tasks(scratch, tiles, ctx.threads().size());
  const std::int64_t runs = std::ssize(begins) - 1;
  ctx.threads().parallel_for(token_blocks * runs, [&](std::int64_t task, int slot) {
    const std::int64_t token = task / runs * block_tokens;
    const std::int64_t count = std::min(block_tokens, tokens - token);
    float* sums = slots + slot * job.parts() * part_floats;
    const auto run = static_cast<std::size_t>(task % runs);
    for (std::int64_t tile = begins[run]; tile < begins[run + 1]; ++tile) {
      const std::int64_t panel = tile * kTilePanels;
      const std::int64_t panels = std::min<std::int64_t>(kTilePanels, part_panels - panel);
      for (std::int64_t part = 0; part < job.parts(); ++part) {
        const bool last_part = part + 1 == job.parts();
        const bool last = last_part && tile + 1 == begins[run + 1];
        kernel({.x = &x,
                .token = token,
                .tokens = count,
                .layout = &layout,
                .first = panel_at(part, tile),
                .panels = static_cast<int>(panels),
                .next = last        ? nullptr
                        : last_part ? panel_at(0, tile + 1)
                                    : panel_at(part + 1, tile),
                .sums = sums + part * part_floats});
      }
      store_panels(job, sums, sums + part_floats, kSumColumns, token, count, panel, panels);
    }
  });
}

// By blocks of columns, of which int4 is expanded first.
void many_tokens(Context& ctx, const Job& job, const PackedLayout& layout, const QuantizedRows& x,
                 ScratchScope& scratch, const PackedKernels& run) {
  const std::int64_t tokens = job.x.shape[0];
  const bool four_bits = job.w.dtype == DType::kQ4;
  const std::int64_t part_panels = layout.panels() / job.parts();
  const std::int64_t token_blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
  const std::int64_t tiles = (part_panels + kMaxPanels - 1) / kMaxPanels;
  const std::int64_t part_sums = std::min(tokens, kBlockTokens) * kTileColumns;
  const std::int64_t sum_floats = part_sums * job.parts();
  const std::int64_t sum_bytes = sum_floats * 4;
  const std::int64_t expanded_bytes = four_bits ? kTileColumns * kQuantBlock : 0;
  const std::int64_t slot_bytes = sum_bytes + expanded_bytes;
  std::byte* slots = scratch.array<std::byte>(ctx.threads().size() * slot_bytes).data();
  const auto multiply_tile = [&](std::int64_t tile, std::int64_t token, int slot) {
    const std::int64_t panel = tile * kMaxPanels;
    auto* sums = reinterpret_cast<float*>(slots + slot * slot_bytes);
    std::byte* expanded = slots + slot * slot_bytes + sum_bytes;
    const auto* matrix = static_cast<const std::byte*>(job.w.data);
    PackedBlock block{
        .x = &x,
        .token = token,
        .tokens = std::min(kBlockTokens, tokens - token),
        .block = 0,
        .columns = 0,
        .panels = static_cast<int>(std::min<std::int64_t>(kMaxPanels, part_panels - panel)),
        .head = nullptr,
        .head_stride = layout.panel_bytes(),
        .values = nullptr,
        .value_stride = four_bits ? kPanelRows * kQuantBlock : layout.panel_bytes(),
        .next = nullptr,
        .next_step = kPanelRows * (four_bits ? 2 : 4),
        .sums = sums,
    };
    std::fill(sums, sums + sum_floats, 0.0F);
    for (block.block = 0; block.block < layout.blocks(); ++block.block) {
      block.columns = layout.block_columns(block.block);
      for (std::int64_t part = 0; part < job.parts(); ++part) {
        block.sums = sums + part * part_sums;
        const std::byte* first = matrix + (part * part_panels + panel) * layout.panel_bytes();
        block.head = first + layout.block_offset(block.block);
        block.next = block.block + 1 < layout.blocks()
                         ? first + layout.block_offset(block.block + 1)
                         : first + kMaxPanels * layout.panel_bytes();
        block.values = block.head + layout.head_bytes();
        if (four_bits) {
          for (int p = 0; p < block.panels; ++p) {
            run.expand(block.head + p * block.head_stride, block.values + p * block.head_stride,
                       block.columns, expanded + p * block.value_stride);
          }
          block.values = expanded;
        }
        run.eight_bits(block);
      }
    }
    store_panels(job, sums, sums + part_sums, kTileColumns, token, block.tokens, panel,
                 block.panels);
  };
  if (token_blocks > 1) {
    ctx.threads().parallel_for(tiles * token_blocks, [&](std::int64_t task, int slot) {
      multiply_tile(task / token_blocks, task % token_blocks * kBlockTokens, slot);
    });
    return;
  }
  // Memory has to keep up: what a tile fetches at its end is for the thread that comes to it.
  const std::span<const std::int64_t> begins =
      shrinking_tasks(scratch, tiles, ctx.threads().size());
  ctx.threads().parallel_for(std::ssize(begins) - 1, [&](std::int64_t task, int slot) {
    const auto i = static_cast<std::size_t>(task);
    for (std::int64_t tile = begins[i]; tile < begins[i + 1]; ++tile) multiply_tile(tile, 0, slot);
  });
}

void run_job(Context& ctx, const Job& job) {
  const PackedKernels run = kernels();
  const PackedLayout layout(job.w.dtype, job.w.shape[0], job.w.shape[1]);
  ScratchScope scratch(ctx);
  const auto few = job.w.dtype == DType::kQ4 ? run.few_four_bits : run.few_eight_bits;
  const auto many = job.w.dtype == DType::kQ4 ? run.many_four_bits : run.many_eight_bits;
  const bool is_few = job.x.shape[0] <= kFewTokens && few != nullptr;
  const QuantizedRows x = quantized(ctx, scratch, job.x, layout, is_few || many == nullptr);
  if (is_few) {
    few_tokens(ctx, job, layout, x, few);
  } else if (many != nullptr) {
    many_tokens(ctx, job, layout, x, scratch, many);
  } else {
    many_tokens(ctx, job, layout, x, scratch, run);
  }
}

}  // namespace

void linear_packed(Context& ctx, const LinearArgs& args) {
  run_job(ctx, {.x = args.x,
                .w = args.w,
                .y = args.y,
                .accumulate = args.accumulate,
                .gated = false,
                .activation = Activation::kIdentity});
}

bool linear_glu_packed(Context& ctx, const LinearGluArgs& args) {
  // Each part begins with a panel of its own.
  if (args.y.shape[1] % kPanelRows != 0) return false;
  run_job(ctx, {.x = args.x,
                .w = args.w,
                .y = args.y,
                .accumulate = false,
                .gated = true,
                .activation = args.activation});
  return true;
}

}  // namespace deltafox::cpu
#endif
