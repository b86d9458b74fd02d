// y [+]= x wᵀ with bfloat16 weights and x rounded to bfloat16: yᵀ = w xᵀ, so that weights are read
// as they lie; x is packed once for each call.
//
// And its gradients, dx = dy w and dw += dyᵀ x, with dy and x rounded the same way.
#if defined(__x86_64__)
#define DELTAFOX_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#include "cpu/bf16_product_amx-inl.h"
#include "cpu/linear_kernels.h"

namespace deltafox::cpu {
namespace {

constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t by) {
  return (n + by - 1) / by;
}

// Sixteen tokens: [steps][16 pairs][16 tokens][2], zeros beyond T and K.
DELTAFOX_TARGET void pack_tokens(const ConstTensorView& x, std::int64_t first, std::uint16_t* to) {
  const std::int64_t depth = x.shape[1];
  const std::int64_t tokens = std::min(kSide, x.shape[0] - first);
  alignas(64) std::uint16_t rows[kTileElements] = {};
  for (std::int64_t k = 0; k < depth; k += kStep) {
    const std::int64_t columns = std::min(kStep, depth - k);
    if (columns < kStep) std::fill_n(rows, kTileElements, std::uint16_t{0});
    for (std::int64_t t = 0; t < tokens; ++t) {
      round_row(x.f32() + (first + t) * depth + k, columns, rows + t * kStep);
    }
    transpose(rows, kStep / 2, to + k * kSide);
  }
}

// Sixteen columns of a matrix whose rows are the inner dimension: [steps][16 pairs][16 columns][2],
// zeros beyond. row_at(d, mask) is its row d rounded, in the low halves of 32 bits.
template <typename RowAt>
DELTAFOX_TARGET inline void pack_pairs(std::int64_t depth, std::int64_t columns, RowAt&& row_at,
                                       std::uint16_t* to) {
  const auto inside = static_cast<__mmask16>((1U << std::min(columns, kSide)) - 1U);
  for (std::int64_t d = 0; d < ceil_div(depth, kStep) * kStep; d += 2, to += 2 * kSide) {
    __m512i pairs = _mm512_setzero_si512();
    if (d < depth) pairs = row_at(d, inside);
    if (d + 1 < depth) pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(row_at(d + 1, inside), 16));
    _mm512_store_si512(to, pairs);
  }
}

DELTAFOX_TARGET void pack_bf16_pairs(const std::uint16_t* from, std::int64_t stride,
                                     std::int64_t depth, std::int64_t columns, std::uint16_t* to) {
  const auto row_at = [&](std::int64_t d, __mmask16 inside) DELTAFOX_TARGET {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, from + d * stride));
  };
  pack_pairs(depth, columns, row_at, to);
}

DELTAFOX_TARGET void pack_f32_pairs(const float* from, std::int64_t stride, std::int64_t depth,
                                    std::int64_t columns, std::uint16_t* to) {
  const auto row_at = [&](std::int64_t d, __mmask16 inside) DELTAFOX_TARGET {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(
        _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, from + d * stride))));
  };
  pack_pairs(depth, columns, row_at, to);
}

// to [16 columns, rows]: sixteen columns of `from` [rows, stride], rounded.
DELTAFOX_TARGET void round_transposed(const float* from, std::int64_t stride, std::int64_t rows,
                                      std::int64_t columns, std::uint16_t* to,
                                      std::int64_t to_stride) {
  alignas(64) float square[kSide * kSide];
  alignas(64) float turned[kSide * kSide];
  const auto inside = static_cast<__mmask16>((1U << std::min(columns, kSide)) - 1U);
  for (std::int64_t r = 0; r < rows; r += kSide) {
    const std::int64_t count = std::min(kSide, rows - r);
    for (std::int64_t i = 0; i < count; ++i) {
      _mm512_store_ps(square + i * kSide, _mm512_maskz_loadu_ps(inside, from + (r + i) * stride));
    }
    transpose(square, kSide, turned);
    for (std::int64_t c = 0; c < std::min(columns, kSide); ++c) {
      round_row(turned + c * kSide, count, to + c * to_stride + r);
    }
  }
}

// Rows of 16-bit elements that don't compete for the same sets of the caches.
constexpr std::int64_t padded(std::int64_t n) {
  return ceil_div(n, kStep) * kStep + kStep;
}

// dx [+]= dy w
void backward_x(Context& ctx, const LinearBackwardArgs& args) {
  const std::int64_t tokens = args.x.shape[0];
  const std::int64_t columns = args.w.shape[1];  // K
  const std::int64_t depth = args.w.shape[0];    // N
  const std::int64_t steps = ceil_div(depth, kStep);
  const std::int64_t stride = padded(depth);
  ScratchScope scratch(ctx);
  std::uint16_t* dy = scratch.array<std::uint16_t>(tokens * stride).data();
  ctx.threads().parallel_for(tokens, [&](std::int64_t t) {
    round_row(args.dy.f32() + t * depth, depth, dy + t * stride);
  });
  const std::int64_t tiles = ceil_div(columns, kSide);
  std::uint16_t* w = scratch.array<std::uint16_t>(tiles * steps * kTileElements).data();
  ctx.threads().parallel_for(tiles, [&](std::int64_t tile) {
    pack_bf16_pairs(static_cast<const std::uint16_t*>(args.w.data) + tile * kSide, columns, depth,
                    columns - tile * kSide, w + tile * steps * kTileElements);
  });
  // A vocabulary is too long for the caches at once.
  constexpr std::int64_t kDepth = 4096;
  for (std::int64_t d = 0; d < depth; d += kDepth) {
    multiply(ctx, {.left = dy + d,
                   .left_stride = stride,
                   .right = w + d / kStep * kTileElements,
                   .right_steps = steps,
                   .rows = tokens,
                   .columns = columns,
                   .depth = std::min(kDepth, depth - d),
                   .y = args.dx.f32(),
                   .y_stride = columns,
                   .transposed = false,
                   .accumulate = args.accumulate_dx || d > 0});
  }
}

// dw += dyᵀ x
void backward_w(Context& ctx, const LinearBackwardArgs& args) {
  const std::int64_t depth = args.x.shape[0];    // T
  const std::int64_t columns = args.w.shape[1];  // K
  const std::int64_t rows = args.w.shape[0];     // N
  const std::int64_t steps = ceil_div(depth, kStep);
  const std::int64_t stride = padded(depth);
  ScratchScope scratch(ctx);
  std::uint16_t* dy = scratch.array<std::uint16_t>(rows * stride).data();
  ctx.threads().parallel_for(ceil_div(rows, kSide), [&](std::int64_t tile) {
    const std::int64_t n = tile * kSide;
    round_transposed(args.dy.f32() + n, rows, depth, rows - n, dy + n * stride, stride);
  });
  const std::int64_t tiles = ceil_div(columns, kSide);
  std::uint16_t* x = scratch.array<std::uint16_t>(tiles * steps * kTileElements).data();
  ctx.threads().parallel_for(tiles, [&](std::int64_t tile) {
    pack_f32_pairs(args.x.f32() + tile * kSide, columns, depth, columns - tile * kSide,
                   x + tile * steps * kTileElements);
  });
  multiply(ctx, {.left = dy,
                 .left_stride = stride,
                 .right = x,
                 .right_steps = steps,
                 .rows = rows,
                 .columns = columns,
                 .depth = depth,
                 .y = args.dw.f32(),
                 .y_stride = columns,
                 .transposed = false,
                 .accumulate = true});
}

// w xᵀ, with x packed; y is for the caller to set.
Bf16Product product_of(Context& ctx, ScratchScope& scratch, const ConstTensorView& x,
                       const ConstTensorView& w) {
  const std::int64_t tokens = x.shape[0];
  const std::int64_t depth = w.shape[1];
  const std::int64_t steps = ceil_div(depth, kStep);
  const std::int64_t tiles = ceil_div(tokens, kSide);
  std::uint16_t* packed = scratch.array<std::uint16_t>(tiles * steps * kTileElements).data();
  ctx.threads().parallel_for(tiles, [&](std::int64_t tile) {
    pack_tokens(x, tile * kSide, packed + tile * steps * kTileElements);
  });
  return {.left = static_cast<const std::uint16_t*>(w.data),
          .left_stride = depth,
          .left_tiled = w.dtype == DType::kBF16Tiles,
          .right = packed,
          .right_steps = steps,
          .rows = w.shape[0],
          .columns = tokens,
          .depth = depth,
          .y = nullptr,
          .y_stride = 0,
          .transposed = true,
          .accumulate = false};
}

}  // namespace

void linear_bf16_amx(Context& ctx, const LinearArgs& args) {
  ScratchScope scratch(ctx);
  Bf16Product product = product_of(ctx, scratch, args.x, args.w);
  product.y = args.y.f32();
  product.y_stride = args.w.shape[0];
  product.accumulate = args.accumulate;
  multiply(ctx, product);
}

// A task has rows of the gate and those of `up` that they belong to, for a block of tokens:
// [gate | up] never leaves the caches.
bool linear_glu_bf16_amx(Context& ctx, const LinearGluArgs& args) {
  const std::int64_t tokens = args.x.shape[0];
  const std::int64_t rows = args.y.shape[1];
  if (tokens <= kSide || rows % kSide != 0) return false;
  ScratchScope scratch(ctx);
  const Bf16Product all = product_of(ctx, scratch, args.x, args.w);
  const std::int64_t block = std::min(block_columns(all), tokens);
  const std::int64_t blocks = ceil_div(tokens, block);
  const std::int64_t row_tasks = ceil_div(rows, kGluColumns);
  const std::int64_t slot_floats = 2 * block * kGluColumns;
  float* const slots = scratch.array<float>(ctx.threads().size() * slot_floats).data();
  ctx.threads().parallel_for(blocks * row_tasks, [&](std::int64_t task, int slot) {
    const std::int64_t n = task % row_tasks * kGluColumns;
    const std::int64_t t = task / row_tasks * block;
    const std::int64_t count = std::min(kGluColumns, rows - n);
    const std::int64_t columns = std::min(block, tokens - t);
    float* const gate = slots + slot * slot_floats;
    float* const up = gate + block * kGluColumns;
    const std::uint16_t* const of_gate = all.left + n * all.left_stride;
    const std::uint16_t* const of_up = of_gate + rows * all.left_stride;
    for (const auto& [left, y] : {std::pair(of_gate, gate), std::pair(of_up, up)}) {
      Bf16Product part = all;
      part.left = left;
      part.right += t * part.right_steps * kStep;
      part.rows = count;
      part.columns = columns;
      part.y = y;
      part.y_stride = kGluColumns;
      for (std::int64_t row = 0; row < count; row += 2 * kSide) {
        const std::int64_t end = std::min(count, row + 2 * kSide);
        const std::uint16_t* next = left + end * part.left_stride;  // of the gate's last rows: up's
        if (end == count) next = y == gate ? of_up : nullptr;
        multiply_block(part, row, end, 0, columns, next);
      }
    }
    store_glu(gate, up, kGluColumns, columns, count, args.activation, args.y.f32() + t * rows + n,
              rows);
  });
  return true;
}

void linear_backward_bf16_amx(Context& ctx, const LinearBackwardArgs& args) {
  if (args.dx.data != nullptr) backward_x(ctx, args);
  if (args.dw.data != nullptr) backward_w(ctx, args);
}

}  // namespace deltafox::cpu
#endif
