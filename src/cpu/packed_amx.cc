// The packed kernel by the tile registers of AMX: four columns of sixteen rows, as they lie, are
// rows of the right tile; rows of x, as they lie, of the left one.
#if defined(__x86_64__)
#include <algorithm>

#include "cpu/amx.h"
#include "cpu/intrinsics.h"
#include "cpu/packed_kernels.h"

#define DELTAFOX_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-int8")))

namespace deltafox::cpu::amx {
namespace {

constexpr std::int64_t kSide = 16;

// Tiles: 0 to 3 the products of token tile i and panel j at 2·i + j, 4 and 5 tokens, 6 and 7
// panels.
DELTAFOX_TARGET void configure(std::int64_t tokens) {
  TileConfig config;
  for (int i = 0; i < 2; ++i) {
    const std::int64_t rows = std::clamp<std::int64_t>(tokens - i * kSide, 0, kSide);
    config.set(6 + i, kSide, 64);
    if (rows == 0) continue;
    config.set(4 + i, rows, 64);
    config.set(2 * i, rows, 64);
    config.set(2 * i + 1, rows, 64);
  }
  load_tiles(config);
}

// Up to 32 tokens by up to two panels of a block.
struct Square {
  std::int64_t token;
  std::int64_t tokens;
  int panel;
  int panels;
};

// The tiles of a square, [token][panel] of [16, 16].
using Products = std::int32_t[4][kSide * kSide];

// Where products of a square are to be added:
//   sums[t, 16·p + r] += (products[t, r] − offset of x) · (scale of x · scale of w)
struct Sums {
  const float* scales[2];      // of w, for each panel
  const std::int32_t* offset;  // of x, `stride` apart from token to token
  const float* scale;          // of x
  std::int64_t stride;
  float* to;  // kTileColumns apart

  Sums(const PackedBlock& block, const Square& square) {
    for (int p = 0; p < 2; ++p) {
      const int panel = std::min(square.panel + p, block.panels - 1);
      scales[p] = reinterpret_cast<const float*>(block.head + panel * block.head_stride);
    }
    stride = block.x->blocks;
    const std::int64_t first = index_of(block, square.token);
    offset = block.x->offsets + first;
    scale = block.x->scales + first;
    to = block.sums + square.token * kTileColumns + square.panel * kPanelRows;
  }

  template <int kPanels>
  DELTAFOX_TARGET void add_row(const Products& products, std::int64_t t) const {
    const __m512i offsets = _mm512_set1_epi32(offset[t * stride]);
    const __m512 scale_of_x = _mm512_set1_ps(scale[t * stride]);
    const std::int32_t* row = products[t / kSide * 2] + t % kSide * kSide;
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      const __m512i exact = _mm512_sub_epi32(_mm512_load_si512(row + p * kSide * kSide), offsets);
      const __m512 scale_of_both = _mm512_mul_ps(scale_of_x, _mm512_loadu_ps(scales[p]));
      const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale_of_both);
      float* sum = to + t * kTileColumns + p * kPanelRows;
      _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), term));
    }
  }
};

DELTAFOX_TARGET inline void store_tiles(const Square& square, Products& products) {
  const bool tokens2 = square.tokens > kSide;
  const bool panels2 = square.panels > 1;
  _tile_stored(0, products[0], 64);
  if (panels2) _tile_stored(1, products[1], 64);
  if (tokens2) _tile_stored(2, products[2], 64);
  if (tokens2 && panels2) _tile_stored(3, products[3], 64);
}

template <bool kTokens2, bool kPanels2>
DELTAFOX_TARGET inline void zero_tiles() {
  _tile_zero(0);
  if constexpr (kPanels2) _tile_zero(1);
  if constexpr (kTokens2) _tile_zero(2);
  if constexpr (kTokens2 && kPanels2) _tile_zero(3);
}

// 64 columns.
template <bool kTokens2, bool kPanels2>
DELTAFOX_TARGET inline void step(const std::int8_t* x, std::int64_t x_stride, const std::byte* w,
                                 std::int64_t w_stride) {
  _tile_loadd(4, x, x_stride);
  _tile_loadd(6, w, 64);
  _tile_dpbsud(0, 4, 6);
  if constexpr (kPanels2) {
    _tile_loadd(7, w + w_stride, 64);
    _tile_dpbsud(1, 4, 7);
  }
  if constexpr (kTokens2) {
    _tile_loadd(5, x + kSide * x_stride, x_stride);
    _tile_dpbsud(2, 5, 6);
    if constexpr (kPanels2) _tile_dpbsud(3, 5, 7);
  }
}

// Fetches what is read from memory next for a square's panels, while the square is multiplied. Up
// to eight squares of tokens share it: each takes some cache lines of a panel in each of its steps.
class Fetch {
 public:
  Fetch(const PackedBlock& block, const Square& square) : panel_(block.head_stride) {
    constexpr std::int64_t kSharers = 8;
    const std::int64_t squares = (block.tokens + 2 * kSide - 1) / (2 * kSide);
    const std::int64_t sharers = std::min(kSharers, squares);
    const std::int64_t lines = kQuantStep / 4 * block.next_step / kLine;  // of one square's step
    lines_ = (lines + sharers - 1) / sharers;
    constexpr std::int64_t kSteps = kQuantBlock / kQuantStep;
    next_ = block.next + square.panel * panel_ +
            square.token / (2 * kSide) % kSharers * kSteps * lines_ * kLine;
  }

  template <bool kPanels2>
  DELTAFOX_TARGET void step() {
    for (std::int64_t line = 0; line < lines_; ++line, next_ += kLine) {
      _mm_prefetch(reinterpret_cast<const char*>(next_), _MM_HINT_T1);
      if constexpr (kPanels2) {
        _mm_prefetch(reinterpret_cast<const char*>(next_ + panel_), _MM_HINT_T1);
      }
    }
  }

 private:
  static constexpr std::int64_t kLine = 64;
  const std::byte* next_;
  std::int64_t panel_;
  std::int64_t lines_;
};

template <bool kTokens2, bool kPanels2>
DELTAFOX_TARGET void square_at_edge(const PackedBlock& block, const Square& square,
                                    Products& products) {
  const std::int8_t* x = token_at(block, square.token);
  const std::byte* w = block.values + square.panel * block.value_stride;
  Fetch fetch(block, square);
  zero_tiles<kTokens2, kPanels2>();
  for (std::int64_t k = 0; k < block.columns; k += kQuantStep) {
    step<kTokens2, kPanels2>(x + k, block.x->stride, w + k * kPanelRows, block.value_stride);
    fetch.step<kPanels2>();
  }
  store_tiles(square, products);
  const Sums sums(block, square);
  for (std::int64_t t = 0; t < square.tokens; ++t) sums.add_row<kPanels2 ? 2 : 1>(products, t);
}

// A square of 32 tokens or 16, two panels and a whole block of columns. Between its steps the
// products of the whole square before it are added: the processor does both at a time.
template <bool kTokens2, bool kFirst>
DELTAFOX_TARGET inline void whole_square(const PackedBlock& block, const Square& square,
                                         const Sums& before, Products& products) {
  const std::int8_t* x = token_at(block, square.token);
  const std::byte* w = block.values + square.panel * block.value_stride;
  const std::int64_t x_stride = block.x->stride;
  const std::int64_t w_stride = block.value_stride;
  const Sums sums = before;
  constexpr std::int64_t kSteps = kQuantBlock / kQuantStep;
  Fetch fetch(block, square);
  zero_tiles<kTokens2, true>();
#pragma GCC unroll 4
  for (std::int64_t k = 0; k < kQuantBlock; k += kQuantStep) {
    step<kTokens2, true>(x + k, x_stride, w + k * kPanelRows, w_stride);
    fetch.step<true>();
    if constexpr (kFirst) continue;
    constexpr std::int64_t kRows = (kTokens2 ? 2 : 1) * kSide / kSteps;
#pragma GCC unroll 8
    for (std::int64_t t = 0; t < kRows; ++t) {
      sums.add_row<2>(products, k / kQuantStep * kRows + t);
    }
  }
  store_tiles(square, products);
}

// Those of tokens [begin, end) and panels [0, panels).
template <bool kTokens2>
DELTAFOX_TARGET void whole_squares(const PackedBlock& block, std::int64_t begin, std::int64_t end,
                                   int panels, Products& products) {
  if (begin == end || panels == 0) return;
  constexpr std::int64_t kTokens = (kTokens2 ? 2 : 1) * kSide;
  Square square{begin, kTokens, 0, 2};
  Sums before(block, square);
  whole_square<kTokens2, true>(block, square, before, products);
  for (;;) {
    square.panel += 2;
    if (square.panel == panels) {
      square.panel = 0;
      square.token += kTokens;
    }
    if (square.token == end) break;
    whole_square<kTokens2, false>(block, square, before, products);
    before = Sums(block, square);
  }
  for (std::int64_t t = 0; t < kTokens; ++t) before.add_row<2>(products, t);
}

}  // namespace

DELTAFOX_TARGET void eight_bits(const PackedBlock& block) {
  alignas(64) Products products;
  finish_stores();
  const std::int64_t tokens = block.columns == kQuantBlock ? block.tokens : 0;  // of whole squares
  const std::int64_t large = tokens / (2 * kSide) * (2 * kSide);  // in squares of 32 tokens
  const std::int64_t whole = tokens / kSide * kSide;
  const int whole_panels = block.panels / 2 * 2;
  if (whole > 0) configure(2 * kSide);
  whole_squares<true>(block, 0, large, whole_panels, products);
  whole_squares<false>(block, large, whole, whole_panels, products);
  Square square{};
  for (; square.token < block.tokens; square.token += square.tokens) {
    const std::int64_t end = square.token < whole && square.token >= large ? whole : block.tokens;
    square.tokens = std::min(2 * kSide, end - square.token);
    const int first = square.token < whole ? whole_panels : 0;
    if (first == block.panels) continue;
    configure(square.tokens);
    for (square.panel = first; square.panel < block.panels; square.panel += 2) {
      square.panels = std::min(2, block.panels - square.panel);
      if (square.tokens > kSide) {
        square.panels == 2 ? square_at_edge<true, true>(block, square, products)
                           : square_at_edge<true, false>(block, square, products);
      } else {
        square.panels == 2 ? square_at_edge<false, true>(block, square, products)
                           : square_at_edge<false, false>(block, square, products);
      }
    }
  }
  _tile_release();
}

}  // namespace deltafox::cpu::amx
#endif
