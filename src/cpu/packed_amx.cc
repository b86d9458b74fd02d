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

// sums[t, 16·p + r] += (products[t, r] − 128 · Σx) · (scale of x · scale of w)
DELTAFOX_TARGET inline void add_products(const PackedBlock& block, std::int64_t token,
                                         std::int64_t tokens, int panel,
                                         const std::int32_t* products) {
  const __m512 scales = _mm512_loadu_ps(block.head + panel * block.head_stride);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t row = (block.token + token + t) * block.x->blocks + block.block;
    const __m512i exact = _mm512_sub_epi32(_mm512_load_si512(products + t * kSide),
                                           _mm512_set1_epi32(128 * block.x->sums[row]));
    const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(exact),
                                      _mm512_mul_ps(_mm512_set1_ps(block.x->scales[row]), scales));
    float* sums = block.sums + (token + t) * kTileColumns + panel * kPanelRows;
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), term));
  }
}

template <bool kTokens2, bool kPanels2>
DELTAFOX_TARGET void tile(const PackedBlock& block, std::int64_t token, std::int64_t tokens,
                          int panel) {
  const std::int64_t stride = block.x->stride;
  const std::int8_t* x = block.x->q + (block.token + token) * stride + block.block * kQuantBlock;
  const std::byte* w = block.values + panel * block.value_stride;
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
  alignas(64) std::int32_t products[4][kSide * kSide];
  _tile_stored(0, products[0], 64);
  if constexpr (kPanels2) _tile_stored(1, products[1], 64);
  if constexpr (kTokens2) _tile_stored(2, products[2], 64);
  if constexpr (kTokens2 && kPanels2) _tile_stored(3, products[3], 64);
  for (int i = 0; i < (kTokens2 ? 2 : 1); ++i) {
    const std::int64_t rows = std::min(kSide, tokens - i * kSide);
    for (int j = 0; j < (kPanels2 ? 2 : 1); ++j) {
      add_products(block, token + i * kSide, rows, panel + j, products[2 * i + j]);
    }
  }
}

template <bool kTokens2>
DELTAFOX_TARGET void panels(const PackedBlock& block, std::int64_t token, std::int64_t tokens) {
  int p = 0;
  for (; p + 2 <= block.panels; p += 2) tile<kTokens2, true>(block, token, tokens, p);
  if (p < block.panels) tile<kTokens2, false>(block, token, tokens, p);
}

}  // namespace

DELTAFOX_TARGET void eight_bits(const PackedBlock& block) {
  std::int64_t configured = 0;
  for (std::int64_t t = 0; t < block.tokens; t += 2 * kSide) {
    const std::int64_t tokens = std::min(2 * kSide, block.tokens - t);
    if (tokens != configured) configure(tokens);
    configured = tokens;
    if (tokens > kSide) {
      panels<true>(block, t, tokens);
    } else {
      panels<false>(block, t, tokens);
    }
  }
  _tile_release();
}

}  // namespace deltafox::cpu::amx
#endif
