// The packed kernels by the tile registers of AMX: four columns of sixteen rows, in the order in
// which they lie, are rows of the right tile; rows of x, as they lie, of the left one.
#if defined(__x86_64__)
#include <algorithm>
#include <type_traits>

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

constexpr std::int64_t kSumColumns = kTilePanels * kPanelRows;
constexpr std::int64_t kPanelBytes = kPanelRows * kQuantBlock;  // of a block, a byte a value

// Up to 32 tokens by the panels, of a block of columns:
//   sums[t, 16·p + r] = fma(products[t, r], scales of x[t] · scales of w[r], sums[…])
struct Square {
  const std::int8_t* x;  // rows x_stride apart
  const float* scales_of_x;
  float* sums;              // [tokens, kSumColumns]
  const std::byte* values;  // of the panels, as signed bytes
  const float* scales[2];   // of w, for each panel
  bool begins;              // the sums are still 0
};

// The tiles of a square, [token][panel] of [16, 16].
using Products = std::int32_t[4][kSide * kSide];

template <int kPanels>
DELTAFOX_TARGET inline void add_row(const Square& square, const Products& products,
                                    std::int64_t t) {
  const __mmask16 adds = square.begins ? 0 : 0xffff;
  const __m512 scale_of_x = _mm512_set1_ps(square.scales_of_x[t]);
  const std::int32_t* row = products[t / kSide * 2] + t % kSide * kSide;
  float* sums = square.sums + t * kSumColumns;
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; ++p) {
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_load_si512(row + p * kSide * kSide));
    const __m512 scale = _mm512_mul_ps(scale_of_x, _mm512_loadu_ps(square.scales[p]));
    const __m512 before = _mm512_maskz_loadu_ps(adds, sums + p * kPanelRows);
    _mm512_storeu_ps(sums + p * kPanelRows, _mm512_fmadd_ps(exact, scale, before));
  }
}

template <bool kTokens2, bool kPanels2>
DELTAFOX_TARGET inline void zero_tiles() {
  _tile_zero(0);
  if constexpr (kPanels2) _tile_zero(1);
  if constexpr (kTokens2) _tile_zero(2);
  if constexpr (kTokens2 && kPanels2) _tile_zero(3);
}

template <bool kTokens2, bool kPanels2>
DELTAFOX_TARGET inline void store_tiles(Products& products) {
  _tile_stored(0, products[0], 64);
  if constexpr (kPanels2) _tile_stored(1, products[1], 64);
  if constexpr (kTokens2) _tile_stored(2, products[2], 64);
  if constexpr (kTokens2 && kPanels2) _tile_stored(3, products[3], 64);
}

// 64 columns. Of two products in a row one operand is the same: that is faster by a twentieth.
template <bool kTokens2, bool kPanels2>
DELTAFOX_TARGET inline void step(const std::int8_t* x, std::int64_t x_stride, const std::byte* w) {
  _tile_loadd(4, x, x_stride);
  _tile_loadd(6, w, 64);
  _tile_dpbssd(0, 4, 6);
  if constexpr (kTokens2) {
    _tile_loadd(5, x + kSide * x_stride, x_stride);
    _tile_dpbssd(2, 5, 6);
  }
  if constexpr (kPanels2) {
    _tile_loadd(7, w + kPanelBytes, 64);
    if constexpr (kTokens2) _tile_dpbssd(3, 5, 7);
    _tile_dpbssd(1, 4, 7);
  }
}

// Fetches what is read from memory next, the following block of the panels, while squares are
// multiplied. Up to eight squares share it: each takes some cache lines of a panel in each of its
// steps.
class Fetch {
 public:
  Fetch(const std::byte* next, std::int64_t panel_bytes, std::int64_t block_bytes,
        std::int64_t tokens)
      : next_(next), panel_(panel_bytes) {
    if (next == nullptr) return;
    constexpr std::int64_t kSharers = 8;
    constexpr std::int64_t kSteps = kQuantBlock / kQuantStep;
    const std::int64_t squares = (tokens + 2 * kSide - 1) / (2 * kSide);
    steps_ = std::min(kSharers, squares) * kSteps;
    lines_ = (block_bytes / kLine + steps_ - 1) / steps_;
  }

  template <bool kPanels2>
  DELTAFOX_TARGET void step() {
    if (steps_-- <= 0) return;
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
  std::int64_t steps_ = 0;
  std::int64_t lines_ = 0;  // of a step
};

// A square of 32 tokens or 16, two panels and a whole block of columns. Between its steps the
// products of the square before it are added, if such a one waits: the processor does both at a
// time.
template <bool kTokens2, bool kWaiting>
DELTAFOX_TARGET inline void whole_square(const Square square, const Square waiting,
                                         std::int64_t x_stride, Fetch& fetch, Products& products) {
  constexpr std::int64_t kSteps = kQuantBlock / kQuantStep;
  zero_tiles<kTokens2, true>();
#pragma GCC unroll 4
  for (std::int64_t k = 0; k < kQuantBlock; k += kQuantStep) {
    step<kTokens2, true>(square.x + k, x_stride, square.values + k * kPanelRows);
    fetch.step<true>();
    if constexpr (!kWaiting) continue;
    constexpr std::int64_t kRows = (kTokens2 ? 2 : 1) * kSide / kSteps;
#pragma GCC unroll 8
    for (std::int64_t t = 0; t < kRows; ++t) {
      add_row<2>(waiting, products, k / kQuantStep * kRows + t);
    }
  }
  store_tiles<kTokens2, true>(products);
}

// The square behind one of `tokens` tokens.
DELTAFOX_TARGET inline void advance(Square& square, std::int64_t tokens, std::int64_t x_stride) {
  square.x += tokens * x_stride;
  square.scales_of_x += tokens;
  square.sums += tokens * kSumColumns;
}

// `count` squares, one behind the other. Products of `waiting`, if there is one, are added; those
// of the last square, which becomes `square`, wait then.
template <bool kTokens2>
DELTAFOX_TARGET void whole_squares(Square& square, std::int64_t count, const Square* waiting,
                                   std::int64_t x_stride, Fetch& fetch_of_block,
                                   Products& products) {
  Fetch fetch = fetch_of_block;
  Square now = square;
  if (waiting == nullptr) {
    whole_square<kTokens2, false>(now, now, x_stride, fetch, products);
  } else {
    whole_square<kTokens2, true>(now, *waiting, x_stride, fetch, products);
  }
  for (std::int64_t i = 1; i < count; ++i) {
    const Square before = now;
    advance(now, (kTokens2 ? 2 : 1) * kSide, x_stride);
    whole_square<kTokens2, true>(now, before, x_stride, fetch, products);
  }
  square = now;
  fetch_of_block = fetch;
}

template <bool kTokens2, bool kPanels2>
DELTAFOX_TARGET void square_at_edge(const Square& square, std::int64_t tokens, std::int64_t columns,
                                    std::int64_t x_stride, Fetch& fetch, Products& products) {
  zero_tiles<kTokens2, kPanels2>();
  for (std::int64_t k = 0; k < columns; k += kQuantStep) {
    step<kTokens2, kPanels2>(square.x + k, x_stride, square.values + k * kPanelRows);
    fetch.step<kPanels2>();
  }
  store_tiles<kTokens2, kPanels2>(products);
  for (std::int64_t t = 0; t < tokens; ++t) add_row<kPanels2 ? 2 : 1>(square, products, t);
}

DELTAFOX_TARGET void square_at_edge(const Square& square, std::int64_t tokens, int panels,
                                    std::int64_t columns, std::int64_t x_stride, Fetch& fetch,
                                    Products& products) {
  configure(tokens);
  if (tokens > kSide) {
    panels == 2 ? square_at_edge<true, true>(square, tokens, columns, x_stride, fetch, products)
                : square_at_edge<true, false>(square, tokens, columns, x_stride, fetch, products);
  } else {
    panels == 2 ? square_at_edge<false, true>(square, tokens, columns, x_stride, fetch, products)
                : square_at_edge<false, false>(square, tokens, columns, x_stride, fetch, products);
  }
  configure(2 * kSide);
}

// Values of kQ8 without the 128 that they are too large.
DELTAFOX_TARGET inline void make_signed(const std::byte* values, std::int64_t columns,
                                        std::byte* to) {
  const __m512i sign = _mm512_set1_epi8(-128);
  for (std::int64_t i = 0; i < columns * kPanelRows; i += 64) {
    _mm512_store_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(values + i), sign));
  }
}

template <bool kFourBits>
DELTAFOX_TARGET void multiply(const PackedPanels& panels) {
  alignas(64) Products products;
  alignas(64) std::byte values[kTilePanels * kPanelBytes];
  const QuantizedRows& x = *panels.x;
  const PackedLayout& layout = *panels.layout;
  const std::int64_t panel_bytes = layout.panel_bytes();
  const std::int64_t x_stride = x.stride;
  Square waiting{};
  std::int64_t waiting_tokens = 0;
  const auto finish = [&]() DELTAFOX_TARGET {
    for (std::int64_t t = 0; t < waiting_tokens; ++t) add_row<2>(waiting, products, t);
    waiting_tokens = 0;
  };
  finish_stores();
  configure(2 * kSide);
  for (std::int64_t block = 0; block < layout.blocks(); ++block) {
    const std::int64_t columns = layout.block_columns(block);
    const std::byte* head = panels.first + layout.block_offset(block);
    for (int p = 0; p < panels.panels; ++p) {
      const std::byte* at = head + p * panel_bytes;
      const std::byte* packed = at + layout.head_bytes();
      std::byte* to = values + p * kPanelBytes;
      if constexpr (kFourBits) {
        avx512::expand_signed(at, packed, columns, to);
      } else {
        make_signed(packed, columns, to);
      }
    }
    finish_stores();
    const bool last = block + 1 == layout.blocks();
    Fetch fetch(last ? panels.next : panels.first + layout.block_offset(block + 1), panel_bytes,
                layout.block_offset(1), panels.tokens);
    Square square{
        .x = x.q + panels.token * x.stride + block * kQuantBlock,
        .scales_of_x = x.scales + x.index(panels.token, block),
        .sums = panels.sums,
        .values = values,
        .scales = {reinterpret_cast<const float*>(head),
                   reinterpret_cast<const float*>(head + panel_bytes)},
        .begins = block == 0,
    };
    const auto whole_ones = [&](auto tokens2, std::int64_t tokens) DELTAFOX_TARGET {
      constexpr bool kTokens2 = decltype(tokens2)::value;
      constexpr std::int64_t kTokens = (kTokens2 ? 2 : 1) * kSide;
      if (tokens < kTokens) return;
      if (waiting_tokens != kTokens) finish();
      whole_squares<kTokens2>(square, tokens / kTokens, waiting_tokens > 0 ? &waiting : nullptr,
                              x_stride, fetch, products);
      waiting = square;
      waiting_tokens = kTokens;
      advance(square, kTokens, x_stride);
    };
    const bool whole = columns == kQuantBlock && panels.panels == kTilePanels;
    std::int64_t left = panels.tokens;
    if (whole) {
      whole_ones(std::true_type(), left);
      left %= 2 * kSide;
      whole_ones(std::false_type(), left);
      left %= kSide;
    }
    for (; left > 0; left -= std::min(left, 2 * kSide)) {
      finish();
      square_at_edge(square, std::min(left, 2 * kSide), panels.panels, columns, x_stride, fetch,
                     products);
      advance(square, 2 * kSide, x_stride);
    }
  }
  finish();
  _tile_release();
}

}  // namespace

void many_eight_bits(const PackedPanels& panels) {
  multiply<false>(panels);
}

void many_four_bits(const PackedPanels& panels) {
  multiply<true>(panels);
}

}  // namespace deltafox::cpu::amx
#endif
