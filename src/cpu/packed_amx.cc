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

template <bool kTokens2, bool kPanels2>
DELTAFOX_TARGET inline void multiply(const PackedBlock& block, const Square& square) {
  const std::int64_t stride = block.x->stride;
  const std::int8_t* x =
      block.x->q + (block.token + square.token) * stride + block.block * kQuantBlock;
  const std::byte* w = block.values + square.panel * block.value_stride;
  _tile_zero(0);
  if constexpr (kPanels2) _tile_zero(1);
  if constexpr (kTokens2) _tile_zero(2);
  if constexpr (kTokens2 && kPanels2) _tile_zero(3);
  for (std::int64_t k = 0; k < block.columns; k += 64) {
    _tile_loadd(4, x + k, stride);
    _tile_loadd(6, w + k * kPanelRows, 64);
    _tile_dpbsud(0, 4, 6);
    if constexpr (kPanels2) {
      _tile_loadd(7, w + block.value_stride + k * kPanelRows, 64);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (kTokens2) {
      _tile_loadd(5, x + kSide * stride + k, stride);
      _tile_dpbsud(2, 5, 6);
      if constexpr (kPanels2) _tile_dpbsud(3, 5, 7);
    }
  }
}

// The tiles of a square, [token][panel] of [16, 16].
using Products = std::int32_t[4][kSide * kSide];

DELTAFOX_TARGET inline void store_tiles(const Square& square, Products& products) {
  const bool tokens2 = square.tokens > kSide;
  const bool panels2 = square.panels > 1;
  _tile_stored(0, products[0], 64);
  if (panels2) _tile_stored(1, products[1], 64);
  if (tokens2) _tile_stored(2, products[2], 64);
  if (tokens2 && panels2) _tile_stored(3, products[3], 64);
}

// sums[t, 16·p + r] += (products[t, r] − offset of x) · (scale of x · scale of w)
template <int kPanels>
DELTAFOX_TARGET inline void add_products(const PackedBlock& block, const Square& square,
                                         const Products& products) {
  __m512 scales[kPanels];
  for (int p = 0; p < kPanels; ++p) {
    scales[p] = _mm512_loadu_ps(block.head + (square.panel + p) * block.head_stride);
  }
  const std::int64_t first = (block.token + square.token) * block.x->blocks + block.block;
  const std::int32_t* offset = block.x->offsets + first;
  const float* scale = block.x->scales + first;
  float* sums = block.sums + square.token * kTileColumns + square.panel * kPanelRows;
  for (std::int64_t t = 0; t < square.tokens; ++t) {
    const __m512i offsets = _mm512_set1_epi32(*offset);
    const __m512 scale_of_x = _mm512_set1_ps(*scale);
    const std::int32_t* row = products[t / kSide * 2] + t % kSide * kSide;
    for (int p = 0; p < kPanels; ++p) {
      const __m512i exact = _mm512_sub_epi32(_mm512_load_si512(row + p * kSide * kSide), offsets);
      const __m512 term =
          _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_mul_ps(scale_of_x, scales[p]));
      float* to = sums + p * kPanelRows;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), term));
    }
    offset += block.x->blocks;
    scale += block.x->blocks;
    sums += kTileColumns;
  }
}

}  // namespace

// The products of a square are added while the tiles multiply for the next one.
DELTAFOX_TARGET void eight_bits(const PackedBlock& block) {
  alignas(64) Products products;
  Square before{};
  const auto finish = [&]() DELTAFOX_TARGET {
    if (before.panels == 2) add_products<2>(block, before, products);
    if (before.panels == 1) add_products<1>(block, before, products);
  };
  std::int64_t configured = 0;
  finish_stores();
  for (std::int64_t t = 0; t < block.tokens; t += 2 * kSide) {
    const std::int64_t tokens = std::min(2 * kSide, block.tokens - t);
    if (tokens != configured) configure(tokens);
    configured = tokens;
    for (int p = 0; p < block.panels; p += 2) {
      const Square square{t, tokens, p, std::min(2, block.panels - p)};
      if (tokens > kSide) {
        square.panels == 2 ? multiply<true, true>(block, square)
                           : multiply<true, false>(block, square);
      } else {
        square.panels == 2 ? multiply<false, true>(block, square)
                           : multiply<false, false>(block, square);
      }
      finish();
      store_tiles(square, products);
      before = square;
    }
  }
  finish();
  _tile_release();
}

}  // namespace deltafox::cpu::amx
#endif
