#include "cpu/bf16_tiles.h"

#if defined(__x86_64__)
#include <algorithm>

#include "cpu/amx.h"
#include "cpu/intrinsics.h"

#define DELTAFOX_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

#include "cpu/transpose_avx512-inl.h"

namespace deltafox::cpu::amx {
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
    _tile_loadd(4, left + k, left_bytes);
    _tile_loadd(6, right + k * kTileSide, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns2) {
      _tile_loadd(7, right + (of.right_depth + k) * kTileSide, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
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

DELTAFOX_TARGET void transpose(const float* from, std::int64_t stride, std::int64_t rows,
                               std::int64_t columns, float* to, std::int64_t to_stride) {
  for (std::int64_t r = 0; r < rows; r += kTileSide) {
    for (std::int64_t c = 0; c < columns; c += kTileSide) {
      cpu::transpose(from + r * stride + c, stride, to + c * to_stride + r, to_stride);
    }
  }
}

DELTAFOX_TARGET void round_left(const float* from, std::int64_t stride, std::int64_t rows,
                                std::int64_t columns, float scale, std::uint16_t* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  const auto columns_at = [&](std::int64_t k) DELTAFOX_TARGET {
    const std::int64_t count = std::clamp<std::int64_t>(columns - k, 0, kTileSide);
    const auto inside = static_cast<__mmask16>((1U << count) - 1U);
    return _mm512_mul_ps(_mm512_maskz_loadu_ps(inside, from + k), factor);
  };
  for (std::int64_t r = 0; r < rows; ++r, from += stride) {
    // Whole lines: tiles cannot be loaded from halves that are still on their way to the cache.
    for (std::int64_t k = 0; k < columns; k += kTileDepth, to += kTileDepth) {
      const __m512 first = columns_at(k);
      const auto both = _mm512_cvtne2ps_pbh(columns_at(k + kTileSide), first);
      _mm512_storeu_si512(to, reinterpret_cast<__m512i>(both));
    }
  }
}

DELTAFOX_TARGET void pack_right(const float* from, std::int64_t stride, std::int64_t depth,
                                std::int64_t padded, std::int64_t columns, std::uint16_t* to) {
  const __m512i side_by_side = _mm512_set_epi32(
      0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007,
      0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  for (std::int64_t d = 0; d < padded; d += 2) {
    const __mmask16 first = d < depth ? 0xffff : 0;
    const __mmask16 second = d + 1 < depth ? 0xffff : 0;
    for (std::int64_t c = 0; c < columns; c += kTileSide) {
      const float* at = from + d * stride + c;
      const auto rows = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
          _mm512_maskz_loadu_ps(second, at + stride), _mm512_maskz_loadu_ps(first, at)));
      _mm512_storeu_si512(to + c * padded + d * kTileSide,
                          _mm512_permutexvar_epi16(side_by_side, rows));
    }
  }
}

DELTAFOX_TARGET void multiply(const SmallProduct& of) {
  finish_stores();
  std::int64_t configured = 0;
  for (std::int64_t r = 0; r < of.rows; r += 2 * kTileSide) {
    const std::int64_t rows = std::min(2 * kTileSide, of.rows - r);
    if (rows != configured) configure(rows);
    configured = rows;
    std::int64_t c = 0;
    for (; c + 2 * kTileSide <= of.columns; c += 2 * kTileSide) {
      rows > kTileSide ? square<true, true>(of, r, c) : square<false, true>(of, r, c);
    }
    if (c < of.columns) {
      rows > kTileSide ? square<true, false>(of, r, c) : square<false, false>(of, r, c);
    }
  }
  _tile_release();
}

}  // namespace deltafox::cpu::amx
#endif
