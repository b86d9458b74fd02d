#include "cpu/bf16_tiles.h"

#if defined(__x86_64__)
#include <algorithm>
#include <cstring>

#include "cpu/intrinsics.h"
#include "cpu/isa.h"

#define DELTAFOX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

#include "cpu/transpose_avx512-inl.h"

namespace deltafox::cpu::bf16 {
namespace {

// kRows rows by kVectors · 16 columns: pairs of a row times those of sixteen columns.
template <int kRows, int kVectors>
DELTAFOX_TARGET inline void rectangle(const SmallProduct& of, std::int64_t row,
                                      std::int64_t column) {
  const std::uint16_t* left = of.left + row * of.left_stride;
  const std::uint16_t* right = of.right + column * of.right_depth;
  float* y = of.y + row * of.y_stride + column;
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = of.accumulate ? _mm512_loadu_ps(y + r * of.y_stride + v * kTileSide)
                                 : _mm512_setzero_ps();
    }
  }
  if (of.meanwhile != nullptr) of.meanwhile->fetch(2);
  for (std::int64_t k = 0; k < of.depth; k += 2) {
    __m512bh columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = reinterpret_cast<__m512bh>(
          _mm512_loadu_si512(right + v * kTileSide * of.right_depth + k * kTileSide));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      std::int32_t pair = 0;
      std::memcpy(&pair, left + r * of.left_stride + k, sizeof pair);
      const auto pairs = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], pairs, columns[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_ps(y + r * of.y_stride + v * kTileSide, sums[r][v]);
    }
  }
}

template <int kVectors>
DELTAFOX_TARGET void columns_of(const SmallProduct& of, std::int64_t column) {
  std::int64_t r = 0;
  for (; r + 4 <= of.rows; r += 4) rectangle<4, kVectors>(of, r, column);
  for (; r + 2 <= of.rows; r += 2) rectangle<2, kVectors>(of, r, column);
  for (; r < of.rows; ++r) rectangle<1, kVectors>(of, r, column);
}

DELTAFOX_TARGET void multiply_avx512(const SmallProduct& of) {
  constexpr std::int64_t kVectors = 4;
  std::int64_t c = 0;
  for (; c + kVectors * kTileSide <= of.columns; c += kVectors * kTileSide) {
    columns_of<kVectors>(of, c);
  }
  for (; c < of.columns; c += kTileSide) columns_of<1>(of, c);
}

}  // namespace

DELTAFOX_TARGET void round_left(const float* from, std::int64_t stride, std::int64_t rows,
                                std::int64_t columns, float scale, std::uint16_t* to,
                                std::int64_t to_stride) {
  const __m512 factor = _mm512_set1_ps(scale);
  const std::int64_t whole = columns / kTileDepth * kTileDepth;
  const auto inside = [](std::int64_t count) {
    return static_cast<__mmask16>((1U << std::clamp<std::int64_t>(count, 0, kTileSide)) - 1U);
  };
  const __mmask16 first_rest = inside(columns - whole);
  const __mmask16 second_rest = inside(columns - whole - kTileSide);
  // Whole lines: tiles cannot be loaded from halves that are still on their way to the cache.
  const auto store_line = [&](std::uint16_t* line, __m512 first, __m512 second) DELTAFOX_TARGET {
    const auto both =
        _mm512_cvtne2ps_pbh(_mm512_mul_ps(second, factor), _mm512_mul_ps(first, factor));
    _mm512_storeu_si512(line, reinterpret_cast<__m512i>(both));
  };
  for (std::int64_t r = 0; r < rows; ++r, from += stride, to += to_stride) {
    for (std::int64_t k = 0; k < whole; k += kTileDepth) {
      store_line(to + k, _mm512_loadu_ps(from + k), _mm512_loadu_ps(from + k + kTileSide));
    }
    if (whole < columns) {
      store_line(to + whole, _mm512_maskz_loadu_ps(first_rest, from + whole),
                 _mm512_maskz_loadu_ps(second_rest, from + whole + kTileSide));
    }
  }
}

DELTAFOX_TARGET void pack_right(const float* from, std::int64_t stride, std::int64_t depth,
                                std::int64_t padded, std::int64_t columns, std::uint16_t* to,
                                std::int64_t right_depth) {
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
      _mm512_storeu_si512(to + c * right_depth + d * kTileSide,
                          _mm512_permutexvar_epi16(side_by_side, rows));
    }
  }
}

DELTAFOX_TARGET void transpose_left(const std::uint16_t* left, std::int64_t stride,
                                    std::int64_t columns, std::int64_t depth, std::uint16_t* to) {
  for (std::int64_t c = 0; c < columns; c += kTileSide) {
    for (std::int64_t d = 0; d < depth; d += kTileDepth) {
      cpu::transpose(left + c * stride + d, stride / 2, to + c * depth + d * kTileSide);
    }
  }
}

DELTAFOX_TARGET void right_to_left(const std::uint16_t* right, std::int64_t right_depth,
                                   std::int64_t rows, std::int64_t columns, std::uint16_t* to) {
  const __m512i evens =
      _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                       24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
  for (std::int64_t r = 0; r < rows; r += 2) {
    for (std::int64_t c = 0; c < columns; c += kTileDepth) {
      const std::uint16_t* at = right + c * right_depth + r * kTileSide;
      const __m512i first = _mm512_loadu_si512(at);
      const __m512i second = _mm512_loadu_si512(at + kTileSide * right_depth);
      std::uint16_t* out = to + r * columns + c;
      _mm512_storeu_si512(out, _mm512_permutex2var_epi16(first, evens, second));
      _mm512_storeu_si512(out + columns, _mm512_permutex2var_epi16(first, odds, second));
    }
  }
}

WholeTiles::WholeTiles() {
  if (isa().amx_bf16) configure_amx();
}
WholeTiles::~WholeTiles() {
  if (isa().amx_bf16) release_amx();
}

void multiply(const SmallProduct& product) {
  isa().amx_bf16 ? multiply_amx(product) : multiply_avx512(product);
}

}  // namespace deltafox::cpu::bf16
#endif
