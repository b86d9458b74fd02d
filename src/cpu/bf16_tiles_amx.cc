// The products of small matrices by the tile registers of AMX.
#if defined(__x86_64__)
#include <algorithm>

#include "cpu/amx.h"
#include "cpu/bf16_tiles.h"
#include "cpu/intrinsics.h"

#define DELTAFOX_TARGET __attribute__((target("amx-tile,amx-bf16")))

namespace deltafox::cpu::bf16 {
namespace {

// Up to 32 rows by up to 32 columns. Tiles: 0 to 3 the sums of row tile i and column tile j at
// 2·i + j, 4 and 5 left, 6 and 7 right.
template <bool kRows2, bool kColumns2>
DELTAFOX_TARGET void square(const SmallProduct& of, std::int64_t row, std::int64_t column) {
  const std::uint16_t* left = of.left + row * of.left_stride;
  const std::uint16_t* right = of.right + column * of.right_depth;
  float* y = of.y + row * of.y_stride + column;
  const std::int64_t left_bytes = of.left_stride * 2;
  const std::int64_t y_bytes = of.y_stride * 4;
  float* const y_below = y + kTileSide * of.y_stride;
  if (of.accumulate) {
    _tile_loadd(0, y, y_bytes);
    if constexpr (kColumns2) _tile_loadd(1, y + kTileSide, y_bytes);
    if constexpr (kRows2) _tile_loadd(2, y_below, y_bytes);
    if constexpr (kRows2 && kColumns2) _tile_loadd(3, y_below + kTileSide, y_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kColumns2) _tile_zero(1);
    if constexpr (kRows2) _tile_zero(2);
    if constexpr (kRows2 && kColumns2) _tile_zero(3);
  }
  for (std::int64_t k = 0; k < of.depth; k += kTileDepth) {
    if (of.meanwhile != nullptr) of.meanwhile->fetch(1);
    _tile_loadd(4, left + k, left_bytes);
    _tile_loadd(6, right + k * kTileSide, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns2) {
      _tile_loadd(7, right + (of.right_depth + k) * kTileSide, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (of.meanwhile != nullptr) of.meanwhile->fetch(1);
    if constexpr (kRows2) {
      _tile_loadd(5, left + kTileSide * of.left_stride + k, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColumns2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, y, y_bytes);
  if constexpr (kColumns2) _tile_stored(1, y + kTileSide, y_bytes);
  if constexpr (kRows2) _tile_stored(2, y_below, y_bytes);
  if constexpr (kRows2 && kColumns2) _tile_stored(3, y_below + kTileSide, y_bytes);
}

DELTAFOX_TARGET void configure(std::int64_t rows) {
  TileConfig config;
  for (int i = 0; i < 2; ++i) {
    config.set(6 + i, kTileSide, 64);
    const std::int64_t count = std::clamp<std::int64_t>(rows - i * kTileSide, 0, kTileSide);
    if (count == 0) continue;
    for (const int tile : {2 * i, 2 * i + 1, 4 + i}) config.set(tile, count, 64);
  }
  load_tiles(config);
}

}  // namespace

DELTAFOX_TARGET void configure_amx() {
  configure(2 * kTileSide);
}
DELTAFOX_TARGET void release_amx() {
  _tile_release();
}

DELTAFOX_TARGET void multiply_amx(const SmallProduct& of) {
  finish_stores();
  const std::int64_t whole = of.rows / (2 * kTileSide) * 2 * kTileSide;
  const std::int64_t rest = of.rows - whole;
  // Columns outside: what is read again, and fits into the first-level cache, is the left operand.
  if (whole > 0) {
    if (!of.configured) configure(2 * kTileSide);
    std::int64_t c = 0;
    for (; c + 2 * kTileSide <= of.columns; c += 2 * kTileSide) {
      for (std::int64_t r = 0; r < whole; r += 2 * kTileSide) square<true, true>(of, r, c);
    }
    for (std::int64_t r = 0; c < of.columns && r < whole; r += 2 * kTileSide) {
      square<true, false>(of, r, c);
    }
  }
  if (rest > 0) {
    if (!of.configured) configure(rest);
    std::int64_t c = 0;
    for (; c + 2 * kTileSide <= of.columns; c += 2 * kTileSide) {
      rest > kTileSide ? square<true, true>(of, whole, c) : square<false, true>(of, whole, c);
    }
    if (c < of.columns) {
      rest > kTileSide ? square<true, false>(of, whole, c) : square<false, false>(of, whole, c);
    }
  }
  if (!of.configured) _tile_release();
}

}  // namespace deltafox::cpu::bf16
#endif
