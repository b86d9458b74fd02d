// y [+]= x wᵀ with bfloat16 weights and x rounded to bfloat16, by the tile registers of AMX.
//
// yᵀ = w xᵀ: sixteen rows of w, as they lie, are the left tile, so weights are never rearranged; x
// is packed once for each call, pairs of columns of sixteen tokens side by side. An element adds
// its pairs of products in order of K, whatever the tokens and rows beside it.
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>

#include "cpu/amx.h"
#include "cpu/intrinsics.h"
#include "cpu/linear_kernels.h"

#define DELTAFOX_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

namespace deltafox::cpu {
namespace {

constexpr std::int64_t kSide = 16;  // rows of w, or tokens, of a tile
constexpr std::int64_t kStep = 32;  // columns of a tile of w
constexpr std::int64_t kTileElements = kSide * kStep;

// Up to 32 rows of w by up to 32 tokens.
struct Square {
  const std::uint16_t* x;  // [2 tiles][steps][16 pairs][16 tokens][2]
  const std::uint16_t* w;
  std::int64_t depth;
  std::int64_t rows;
  std::int64_t tokens;
  float* y;
  std::int64_t y_stride;
  bool accumulate;

  std::int64_t steps() const { return (depth + kStep - 1) / kStep; }
  std::int64_t rows_of(int i) const { return std::clamp<std::int64_t>(rows - i * kSide, 0, kSide); }
  std::int64_t tokens_of(int j) const {
    return std::clamp<std::int64_t>(tokens - j * kSide, 0, kSide);
  }
};

// Tiles: 0 to 3 the sums of row tile i and token tile j at 2·i + j, 4 and 5 rows, 6 and 7 tokens.
DELTAFOX_TARGET void configure(const Square& s) {
  TileConfig config;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      if (s.rows_of(i) > 0 && s.tokens_of(j) > 0) {
        config.set(2 * i + j, s.rows_of(i), s.tokens_of(j) * 4);
      }
    }
    if (s.rows_of(i) > 0) config.set(4 + i, s.rows_of(i), kStep * 2);
    if (s.tokens_of(i) > 0) config.set(6 + i, kSide, s.tokens_of(i) * 4);
  }
  load_tiles(config);
}

template <bool kRows2, bool kTokens2>
DELTAFOX_TARGET inline void step(const std::uint16_t* x, std::int64_t x_tile,
                                 const std::uint16_t* w, std::int64_t row_bytes) {
  _tile_loadd(4, w, row_bytes);
  _tile_loadd(6, x, 64);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kTokens2) {
    _tile_loadd(7, x + x_tile, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (kRows2) {
    _tile_loadd(5, reinterpret_cast<const std::byte*>(w) + kSide * row_bytes, row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTokens2) _tile_dpbf16ps(3, 5, 7);
  }
}

// y[t, n + r] = sums[r, t] [+ y], sums [16, 16]
DELTAFOX_TARGET inline void store_transposed(const float* sums, std::int64_t rows,
                                             std::int64_t tokens, float* y, std::int64_t y_stride,
                                             bool accumulate) {
  const __m512i down =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(static_cast<int>(kSide)));
  const auto inside = static_cast<__mmask16>((1U << rows) - 1U);
  for (std::int64_t t = 0; t < tokens; ++t) {
    __m512 column = _mm512_i32gather_ps(down, sums + t, 4);
    float* to = y + t * y_stride;
    if (accumulate) column = _mm512_add_ps(_mm512_maskz_loadu_ps(inside, to), column);
    _mm512_mask_storeu_ps(to, inside, column);
  }
}

template <bool kRows2, bool kTokens2>
DELTAFOX_TARGET void square(const Square& s) {
  _tile_zero(0);
  if constexpr (kTokens2) _tile_zero(1);
  if constexpr (kRows2) _tile_zero(2);
  if constexpr (kRows2 && kTokens2) _tile_zero(3);
  const std::int64_t x_tile = s.steps() * kTileElements;
  const std::int64_t whole = s.depth / kStep;
  for (std::int64_t k = 0; k < whole; ++k) {
    step<kRows2, kTokens2>(s.x + k * kTileElements, x_tile, s.w + k * kStep, s.depth * 2);
  }
  if (whole < s.steps()) {
    // The ends of rows, with zeros beyond.
    alignas(64) std::uint16_t ends[2 * kTileElements] = {};
    const std::int64_t left = s.depth - whole * kStep;
    for (std::int64_t r = 0; r < s.rows; ++r) {
      std::memcpy(ends + r * kStep, s.w + r * s.depth + whole * kStep,
                  static_cast<std::size_t>(left) * 2);
    }
    step<kRows2, kTokens2>(s.x + whole * kTileElements, x_tile, ends, kStep * 2);
  }
  alignas(64) float sums[4][kSide * kSide] = {};
  _tile_stored(0, sums[0], 64);
  if constexpr (kTokens2) _tile_stored(1, sums[1], 64);
  if constexpr (kRows2) _tile_stored(2, sums[2], 64);
  if constexpr (kRows2 && kTokens2) _tile_stored(3, sums[3], 64);
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      store_transposed(sums[2 * i + j], s.rows_of(i), s.tokens_of(j),
                       s.y + j * kSide * s.y_stride + i * kSide, s.y_stride, s.accumulate);
    }
  }
}

DELTAFOX_TARGET void multiply(const Square& s) {
  const bool rows2 = s.rows > kSide;
  const bool tokens2 = s.tokens > kSide;
  if (rows2) {
    tokens2 ? square<true, true>(s) : square<true, false>(s);
  } else {
    tokens2 ? square<false, true>(s) : square<false, false>(s);
  }
}

// Rows [n, n + rows) of w by all tokens.
DELTAFOX_TARGET void rows_by_tokens(const std::uint16_t* x, const LinearArgs& args, std::int64_t n,
                                    std::int64_t rows) {
  const std::int64_t tokens = args.x.shape[0];
  const std::int64_t depth = args.w.shape[1];
  const std::int64_t all_rows = args.w.shape[0];
  Square s{
      .x = x,
      .w = static_cast<const std::uint16_t*>(args.w.data) + n * depth,
      .depth = depth,
      .rows = rows,
      .tokens = 0,
      .y = nullptr,
      .y_stride = all_rows,
      .accumulate = args.accumulate,
  };
  std::int64_t configured = 0;
  for (std::int64_t t = 0; t < tokens; t += 2 * kSide) {
    s.tokens = std::min(2 * kSide, tokens - t);
    s.x = x + t / kSide * s.steps() * kTileElements;
    s.y = args.y.f32() + t * all_rows + n;
    if (s.tokens != configured) configure(s);
    configured = s.tokens;
    multiply(s);
  }
  _tile_release();
}

// Sixteen tokens: [steps][16 pairs][16 tokens][2], zeros beyond T and K.
DELTAFOX_TARGET void pack_tokens(const ConstTensorView& x, std::int64_t first, std::uint16_t* to) {
  const std::int64_t depth = x.shape[1];
  const std::int64_t tokens = std::min(kSide, x.shape[0] - first);
  const std::int64_t steps = (depth + kStep - 1) / kStep;
  std::fill_n(to, steps * kTileElements, std::uint16_t{0});
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float* row = x.f32() + (first + t) * depth;
    for (std::int64_t k = 0; k < depth; k += kStep) {
      alignas(64) std::uint16_t values[kStep];
      for (std::int64_t half = 0; half < kStep; half += 16) {
        const std::int64_t left = std::clamp<std::int64_t>(depth - k - half, 0, 16);
        const auto inside = static_cast<__mmask16>((1U << left) - 1U);
        const auto narrow = reinterpret_cast<__m256i>(
            _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, row + k + half)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + half), narrow);
      }
      for (std::int64_t pair = 0; pair < kStep / 2; ++pair) {
        std::memcpy(to + k * kSide + (pair * kSide + t) * 2, values + pair * 2, 4);
      }
    }
  }
}

}  // namespace

void linear_bf16_amx(Context& ctx, const LinearArgs& args) {
  const std::int64_t tokens = args.x.shape[0];
  const std::int64_t depth = args.w.shape[1];
  const std::int64_t rows = args.w.shape[0];
  const std::int64_t steps = (depth + kStep - 1) / kStep;
  const std::int64_t tiles = (tokens + kSide - 1) / kSide;
  ScratchScope scratch(ctx);
  std::uint16_t* x = scratch.array<std::uint16_t>(tiles * steps * kTileElements).data();
  ctx.threads().parallel_for(tiles, [&](std::int64_t tile) {
    pack_tokens(args.x, tile * kSide, x + tile * steps * kTileElements);
  });
  constexpr std::int64_t kTaskRows = 2 * kSide;
  ctx.threads().parallel_for((rows + kTaskRows - 1) / kTaskRows, [&](std::int64_t task) {
    const std::int64_t n = task * kTaskRows;
    rows_by_tokens(x, args, n, std::min(kTaskRows, rows - n));
  });
}

}  // namespace deltafox::cpu
#endif
