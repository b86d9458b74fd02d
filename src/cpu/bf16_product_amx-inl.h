// Products of bfloat16 matrices with float32 sums, by the tile registers of AMX. A file that
// includes this defines DELTAFOX_TARGET, the target attribute of every function here.
//
// Rows of the left operand are read as they lie; the right one is packed, pairs along the inner
// dimension of sixteen columns side by side. An element adds its pairs of products in order,
// whatever the rows and columns beside it and whichever operand is the left one.
#include <algorithm>
#include <cstdint>

#include "core/context.h"
#include "cpu/amx.h"
#include "cpu/intrinsics.h"
#include "cpu/shrinking_tasks.h"
#include "cpu/transpose_avx512-inl.h"

namespace deltafox::cpu {
namespace {

constexpr std::int64_t kSide = 16;  // rows, or columns, of a tile of sums
constexpr std::int64_t kStep = 32;  // of the inner dimension, of a tile of the left operand
constexpr std::int64_t kTileElements = kSide * kStep;
constexpr std::int64_t kStreams = 4;

// y = sums [+ y] for the first rows and columns of sums [16, 16].
DELTAFOX_TARGET inline void add_or_store(const float* sums, std::int64_t rows, std::int64_t columns,
                                         float* y, std::int64_t y_stride, bool accumulate) {
  const auto inside = static_cast<__mmask16>((1U << columns) - 1U);
  for (std::int64_t r = 0; r < rows; ++r) {
    __m512 row = _mm512_load_ps(sums + r * kSide);
    float* to = y + r * y_stride;
    if (accumulate) row = _mm512_add_ps(_mm512_maskz_loadu_ps(inside, to), row);
    _mm512_mask_storeu_ps(to, inside, row);
  }
}

// n elements of a row of x, rounded.
DELTAFOX_TARGET inline void round_row(const float* x, std::int64_t n, std::uint16_t* to) {
  for (std::int64_t k = 0; k < n; k += 16) {
    const auto inside = static_cast<__mmask16>((1U << std::min<std::int64_t>(16, n - k)) - 1U);
    const auto half =
        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, x + k)));
    _mm256_mask_storeu_epi16(to + k, inside, half);
  }
}

// y [+]= left · right, or its transpose.
struct Bf16Product {
  const std::uint16_t* left;  // [rows, depth], as it lies, or in tiles (ops/tile_order.h)
  std::int64_t left_stride;   // of tiles `depth`
  bool left_tiled = false;
  const std::uint16_t* right;  // [tiles of columns][right_steps][16 pairs of depth][16 columns][2]
  std::int64_t right_steps;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t depth;
  float* y;  // [rows, columns], or [columns, rows]
  std::int64_t y_stride;
  bool transposed;
  bool accumulate;
};

// Up to 32 rows by up to 32 columns.
struct Square {
  const Bf16Product& of;
  const std::uint16_t* left;
  const std::uint16_t* right;
  std::int64_t rows;
  std::int64_t columns;
  float* y;
  // What to fetch from memory meanwhile, kStreams · next_lines cache lines in each step: several
  // streams of memory, next_stream elements apart, come faster than one.
  const std::uint16_t* next = nullptr;
  std::int64_t next_stream = 0;
  std::int64_t next_lines = 0;

  std::int64_t rows_of(int i) const { return std::clamp<std::int64_t>(rows - i * kSide, 0, kSide); }
  std::int64_t columns_of(int j) const {
    return std::clamp<std::int64_t>(columns - j * kSide, 0, kSide);
  }
};

// Tiles: 0 to 3 the sums of row tile i and column tile j at 2·i + j, 4 and 5 left, 6 and 7 right.
DELTAFOX_TARGET void configure(const Square& s) {
  TileConfig config;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      if (s.rows_of(i) > 0 && s.columns_of(j) > 0) {
        config.set(2 * i + j, s.rows_of(i), s.columns_of(j) * 4);
      }
    }
    if (s.rows_of(i) > 0) config.set(4 + i, s.rows_of(i), kStep * 2);
    if (s.columns_of(i) > 0) config.set(6 + i, kSide, s.columns_of(i) * 4);
  }
  load_tiles(config);
}

// A tile's elements in the order of memory, into the caches from level 1 on (kLocality 3) or 2 (2).
template <int kLocality>
DELTAFOX_TARGET inline void fetch(const std::uint16_t* from) {
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < kTileElements; i += kStep) {
    __builtin_prefetch(from + i, 0, kLocality);
  }
}

// What step k of a square fetches, into the second-level cache.
DELTAFOX_TARGET inline void fetch_next(const Square& s, std::int64_t k) {
  const std::uint16_t* at = s.next + k * s.next_lines * kStep;
  for (std::int64_t i = 0; i < s.next_lines; ++i, at += kStep) {
#pragma GCC unroll 4
    for (std::int64_t stream = 0; stream < kStreams; ++stream) {
      _mm_prefetch(reinterpret_cast<const char*>(at + stream * s.next_stream), _MM_HINT_T1);
    }
  }
}

template <bool kRows2, bool kColumns2>
DELTAFOX_TARGET inline void step(const std::uint16_t* left, const std::uint16_t* left2,
                                 std::int64_t row_bytes, const std::uint16_t* right,
                                 std::int64_t right_tile) {
  _tile_loadd(4, left, row_bytes);
  _tile_loadd(6, right, 64);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kColumns2) {
    _tile_loadd(7, right + right_tile, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (kRows2) {
    _tile_loadd(5, left2, row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kColumns2) _tile_dpbf16ps(3, 5, 7);
  }
}

template <bool kRows2, bool kColumns2>
DELTAFOX_TARGET void square(const Square& s) {
  finish_stores();
  _tile_zero(0);
  if constexpr (kColumns2) _tile_zero(1);
  if constexpr (kRows2) _tile_zero(2);
  if constexpr (kRows2 && kColumns2) _tile_zero(3);
  const Bf16Product& of = s.of;
  const std::int64_t right_tile = of.right_steps * kTileElements;
  const std::int64_t whole = of.depth / kStep;
  // Of the two tiles of rows.
  const std::uint16_t* const tiles[2] = {s.left, s.left + kSide * of.left_stride};
  const std::int64_t row_bytes = of.left_tiled ? kStep * 2 : of.left_stride * 2;
  const std::int64_t advance[2] = {of.left_tiled ? s.rows_of(0) * kStep : kStep,
                                   of.left_tiled ? s.rows_of(1) * kStep : kStep};
  for (std::int64_t k = 0; k < whole; ++k) {
    const std::uint16_t* const at[2] = {tiles[0] + k * advance[0], tiles[1] + k * advance[1]};
    step<kRows2, kColumns2>(at[0], at[1], row_bytes, s.right + k * kTileElements, right_tile);
    if (s.next != nullptr) {
      fetch_next(s, k);
    } else if (!kColumns2 && of.left_tiled) {
      constexpr std::int64_t kAhead = 384;  // 768 bytes: more of two streams is slower
      fetch<3>(at[0] + kAhead);
      if constexpr (kRows2) fetch<3>(at[1] + kAhead);
    }
  }
  if (const std::int64_t left = of.depth - whole * kStep; left > 0) {
    // The ends of rows, with zeros beyond.
    alignas(64) std::uint16_t ends[2 * kTileElements] = {};
    for (std::int64_t r = 0; r < s.rows; ++r) {
      std::copy_n(s.left + r * of.left_stride + whole * kStep, left, ends + r * kStep);
    }
    finish_stores();
    step<kRows2, kColumns2>(ends, ends + kTileElements, kStep * 2, s.right + whole * kTileElements,
                            right_tile);
  }
  alignas(64) float sums[4][kSide * kSide] = {};
  _tile_stored(0, sums[0], 64);
  if constexpr (kColumns2) _tile_stored(1, sums[1], 64);
  if constexpr (kRows2) _tile_stored(2, sums[2], 64);
  if constexpr (kRows2 && kColumns2) _tile_stored(3, sums[3], 64);
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      const float* tile = sums[2 * i + j];
      const std::int64_t rows = s.rows_of(i);
      const std::int64_t columns = s.columns_of(j);
      if (of.transposed) {
        alignas(64) float turned[kSide * kSide];
        transpose(tile, kSide, turned);
        add_or_store(turned, columns, rows, s.y + j * kSide * of.y_stride + i * kSide, of.y_stride,
                     of.accumulate);
      } else {
        add_or_store(tile, rows, columns, s.y + i * kSide * of.y_stride + j * kSide, of.y_stride,
                     of.accumulate);
      }
    }
  }
}

DELTAFOX_TARGET void multiply(const Square& s) {
  const bool rows2 = s.rows > kSide;
  const bool columns2 = s.columns > kSide;
  if (rows2) {
    columns2 ? square<true, true>(s) : square<true, false>(s);
  } else {
    columns2 ? square<false, true>(s) : square<false, false>(s);
  }
}

// Rows [row, row_end) by columns [column, column_end), each a multiple of 32 or the last. At `next`
// are 32 rows that are multiplied next: squares share fetching them, which takes up to a tenth from
// a prompt.
DELTAFOX_TARGET void multiply_block(const Bf16Product& of, std::int64_t row, std::int64_t row_end,
                                    std::int64_t column, std::int64_t column_end,
                                    const std::uint16_t* next) {
  Square s{.of = of,
           .left = of.left + row * of.left_stride,
           .right = nullptr,
           .rows = row_end - row,
           .columns = 0,
           .y = nullptr};
  const std::int64_t shares = (column_end - column + 2 * kSide - 1) / (2 * kSide) * kStreams;
  s.next_lines = (2 * kSide + shares - 1) / shares;
  s.next_stream = 2 * kSide * of.left_stride / kStreams;
  s.next = next;
  std::int64_t configured = 0;
  for (std::int64_t c = column; c < column_end; c += 2 * kSide) {
    s.columns = std::min(2 * kSide, column_end - c);
    s.right = of.right + c / kSide * of.right_steps * kTileElements;
    s.y = of.transposed ? of.y + c * of.y_stride + row : of.y + row * of.y_stride + c;
    if (s.columns != configured) configure(s);
    configured = s.columns;
    multiply(s);
    if (next != nullptr) s.next += of.depth / kStep * s.next_lines * kStep;
  }
  _tile_release();
}

// Rows [row, end) by a single tile of columns: the left operand is read once, as memory gives it.
// Two rows of tiles are read side by side. Of a row-major operand one, which is fetched row after
// row, into the second-level cache, while the one before it is multiplied.
DELTAFOX_TARGET void multiply_streamed(const Bf16Product& of, std::int64_t row, std::int64_t end) {
  const std::int64_t side = of.left_tiled ? 2 * kSide : kSide;
  Square s{.of = of,
           .left = of.left + row * of.left_stride,
           .right = of.right,
           .rows = 0,
           .columns = of.columns,
           .y = nullptr};
  s.next_lines = kSide / kStreams;
  s.next_stream = kSide * of.left_stride / kStreams;
  if (!of.left_tiled) {
    for (std::int64_t k = 0; k < of.depth; k += kStep) {
      fetch<2>(s.left + k * kSide);
    }
  }
  std::int64_t configured = 0;
  for (; row < end; row += side) {
    s.rows = std::min(side, end - row);
    s.left = of.left + row * of.left_stride;
    s.y = of.transposed ? of.y + row : of.y + row * of.y_stride;
    s.next = of.left_tiled || row + kSide >= end ? nullptr : s.left + kSide * of.left_stride;
    if (s.rows != configured) configure(s);
    configured = s.rows;
    multiply(s);
  }
  _tile_release();
}

// Columns of the right operand, a multiple of 32, that stay in the second-level cache while the
// left one passes by.
std::int64_t block_columns(const Bf16Product& of) {
  constexpr std::int64_t kBlockBytes = std::int64_t{896} * 1024;
  const std::int64_t pair_bytes = (of.depth + kStep - 1) / kStep * kTileElements * 4;
  return std::max<std::int64_t>(1, kBlockBytes / pair_bytes) * 2 * kSide;
}

void multiply(Context& ctx, const Bf16Product& of) {
  constexpr std::int64_t kPair = 2 * kSide;
  if (of.columns <= kSide) {
    ScratchScope scratch(ctx);
    const std::span<const std::int64_t> begins =
        shrinking_tasks(scratch, (of.rows + kPair - 1) / kPair, ctx.threads().size());
    ctx.threads().parallel_for(std::ssize(begins) - 1, [&](std::int64_t task) {
      const auto i = static_cast<std::size_t>(task);
      multiply_streamed(of, begins[i] * kPair, std::min(of.rows, begins[i + 1] * kPair));
    });
    return;
  }
  const std::int64_t block = block_columns(of);
  const std::int64_t blocks = (of.columns + block - 1) / block;
  // A thread that has several pairs of tiles one below the other can fetch the next.
  const std::int64_t pairs = (of.rows + kPair - 1) / kPair;
  const std::int64_t wanted = 8 * ctx.threads().size();
  const std::int64_t task_rows = std::clamp<std::int64_t>(blocks * pairs / wanted, 1, 8) * kPair;
  const std::int64_t row_tasks = (of.rows + task_rows - 1) / task_rows;
  ctx.threads().parallel_for(blocks * row_tasks, [&](std::int64_t task) {
    const std::int64_t column = task / row_tasks * block;
    const std::int64_t column_end = std::min(of.columns, column + block);
    const std::int64_t first = task % row_tasks * task_rows;
    const std::int64_t end = std::min(of.rows, first + task_rows);
    for (std::int64_t row = first; row < end; row += kPair) {
      const bool last = row + kPair >= end;
      multiply_block(of, row, std::min(end, row + kPair), column, column_end,
                     last ? nullptr : of.left + (row + kPair) * of.left_stride);
    }
  });
}

}  // namespace
}  // namespace deltafox::cpu
